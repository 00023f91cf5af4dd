/**
 * A small part of Markdown, shown while it is written: paragraphs, headings, lists, rules and code blocks.
 *
 * Lines that are whole change the document for good; the line that is being written is shown by a guess, which is
 * taken back before the next piece. So the result never depends on how the text was cut, and a piece costs what
 * the last block costs, however long the text is. Everything is made of DOM nodes: text cannot become markup.
 */

import { appendInline } from "./inline.js";

const FENCE = /^([ \t]{0,40})(`{3,20}|~{3,20})([^`\n]{0,60})$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]{1,4}(.*)$/s;
const RULE = /^ {0,3}(?:(?:- {0,4}){3,30}|(?:\* {0,4}){3,30}|(?:_ {0,4}){3,30})$/;
const ITEM = /^([ \t]{0,40})([-*+]|\d{1,9}[.)])([ \t]{1,4})(.*)$/s;
/** Past this length no line can still turn out to be another kind of line: fences, rules and markers are shorter. */
const CERTAIN = 200;
/** Most characters of a paragraph that are laid out again with each piece. */
const LONGEST_OPEN = 4096;
/** Lines of code that share a box, so that a new one does not lay out all before it. */
const LINES_A_BOX = 64;

export class MarkdownView {
  #root;
  #copyButton;
  #partial = "";
  #guess = null;
  // What is open: lists from the outside in, text, a code block.
  #state = { lists: [], text: null, code: null };

  /**
   * @param {HTMLElement} root gets the blocks  @param {(source: () => string) => HTMLElement} copyButton makes the
   * button of a code block
   */
  constructor(root, copyButton) {
    this.#root = root;
    this.#copyButton = copyButton;
  }

  /** Shows one more piece of the text. */
  append(piece) {
    this.#takeBack();
    const lines = piece.replaceAll("\r", "").split("\n");
    lines[0] = this.#partial + lines[0];
    this.#partial = lines.pop();
    for (const line of lines) this.#line(line, true);
    this.#showPartial();
  }

  /** No more text follows. */
  end() {
    this.#takeBack();
    if (this.#partial) this.#line(this.#partial, true);
    this.#partial = "";
    this.#settle();
  }

  #showPartial() {
    const { text, code } = this.#state;
    const isMidLine = (code ?? text)?.isMidLine;
    if (!isMidLine && this.#partial.length > CERTAIN && this.#partial.trim()) {
      this.#line(this.#partial, false);
      this.#partial = "";
    } else if (code) {
      if (isMidLine || this.#partial.length > CERTAIN) this.#codeText(code, "", this.#partial, true);
      else this.#box(code).data = /^\s*[`~]*\s*$/.test(this.#partial) ? "" : unindent(this.#partial, code.indent);
      if (code.isMidLine) this.#partial = "";
    } else if (isMidLine) {
      text.source += this.#partial;
      this.#partial = "";
    } else if (this.#partial && !/^\s*`{1,2}$/.test(this.#partial)) {
      this.#guess = { state: { ...this.#state, lists: [...this.#state.lists] }, added: [], source: text?.source };
      this.#line(this.#partial, false);
    }
    if (this.#state.text) this.#show(this.#state.text, true);
  }

  #takeBack() {
    if (!this.#guess) return;
    for (const node of this.#guess.added) node.remove();
    this.#state = this.#guess.state;
    if (this.#state.text) Object.assign(this.#state.text, { source: this.#guess.source, isMidLine: false });
    this.#guess = null;
  }

  /** @param {boolean} isWhole the line has ended; otherwise what follows is part of it */
  #line(line, isWhole) {
    const state = this.#state;
    if (state.code) {
      this.#codeLine(state.code, line, isWhole);
    } else if (state.text?.isMidLine) {
      state.text.source += line;
      state.text.isMidLine = !isWhole;
    } else if (!line.trim()) {
      this.#settle();
    } else {
      this.#begin(line);
      if (this.#state.text) this.#state.text.isMidLine = !isWhole;
    }
    if (isWhole && state.text?.isHeading) this.#settle();
    if (isWhole && state.text) this.#shorten(state.text);
  }

  /** A line that is not blank, outside code. */
  #begin(line) {
    const state = this.#state;
    let match;
    if ((match = FENCE.exec(line))) {
      this.#settle();
      const indent = width(match[1]);
      this.#openCode(this.#place(indent), match[2], match[3].trim(), indent);
    } else if ((match = HEADING.exec(line))) {
      this.#settle();
      state.lists = [];
      // Levels 1 and 2 are the page's own.
      const level = Math.min(6, match[1].length + 2);
      this.#openText(this.#add(this.#root, `h${level}`), match[2], true);
    } else if (RULE.test(line)) {
      this.#settle();
      state.lists = [];
      this.#add(this.#root, "hr");
    } else if ((match = ITEM.exec(line))) {
      this.#settle();
      this.#openText(this.#add(this.#item(width(match[1]), match[2]), "p"), match[4], false);
    } else if (state.text) {
      state.text.source += `\n${line}`;
    } else {
      this.#openText(this.#add(this.#place(width(/^[ \t]*/.exec(line)[0])), "p"), line, false);
    }
  }

  /** Where a block with this indentation stands: inside an open item, or at the root, which ends the lists. */
  #place(indent) {
    const { lists } = this.#state;
    while (lists.length && indent < lists.at(-1).indent + 2) lists.pop();
    return lists.length ? lists.at(-1).item : this.#root;
  }

  #item(indent, marker) {
    const { lists } = this.#state;
    const tag = /\d/.test(marker) ? "ol" : "ul";
    while (lists.length && indent < lists.at(-1).indent) lists.pop();
    const above = lists.at(-1);
    if (above && indent < above.indent + 2) {
      lists.pop();
      if (above.tag === tag) {
        const item = this.#add(above.list, "li");
        lists.push({ ...above, item });
        return item;
      }
    }
    const list = this.#add(lists.length ? lists.at(-1).item : this.#root, tag);
    if (tag === "ol" && parseInt(marker, 10) !== 1) list.start = parseInt(marker, 10);
    const item = this.#add(list, "li");
    lists.push({ indent, tag, list, item });
    return item;
  }

  #add(parent, tag) {
    const node = parent.appendChild(document.createElement(tag));
    this.#guess?.added.push(node);
    return node;
  }

  #openText(block, source, isHeading) {
    this.#state.text = { block, span: null, source, isHeading, isMidLine: false };
  }

  /** Draws what is open of a text anew. */
  #show(text, isOpen) {
    this.#shorten(text);
    text.span ??= text.block.appendChild(document.createElement("span"));
    text.span.replaceChildren();
    appendInline(text.span, text.source, isOpen);
  }

  /**
   * Settles the front of a text that has become long, in a box of its own that is not laid out again: best at the end
   * of a line, then of a sentence, then of a word. Where depends on the text alone.
   */
  #shorten(text) {
    if (this.#guess && text === this.#guess.state.text) return;
    while (text.source.length > LONGEST_OPEN) {
      const front = text.source.slice(0, LONGEST_OPEN);
      let cut = [front.lastIndexOf("\n"), front.lastIndexOf(". ") + 1, front.lastIndexOf(" ")].find((at) => at > 0);
      cut ??= /[\uD800-\uDBFF]/.test(front.at(-1)) ? LONGEST_OPEN - 1 : LONGEST_OPEN;
      text.span ??= text.block.appendChild(document.createElement("span"));
      text.span.replaceChildren();
      appendInline(text.span, front.slice(0, cut), false);
      text.span = null;
      text.source = text.source.slice(cut).replace(/^[ \n]/, "");
    }
  }

  #settle() {
    const { text } = this.#state;
    if (text) this.#show(text, false);
    this.#state.text = null;
  }

  #openCode(parent, fence, language, indent) {
    const figure = this.#add(parent, "figure");
    figure.className = "code";
    const head = figure.appendChild(document.createElement("figcaption"));
    const name = head.appendChild(document.createElement("span"));
    name.textContent = language.split(/\s/)[0] || "code";
    const pre = figure.appendChild(document.createElement("pre"));
    pre.tabIndex = 0;
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", `Code: ${name.textContent}`);
    const element = pre.appendChild(document.createElement("code"));
    const code = { element, fence, indent, pieces: [], box: null, lines: 0, isMidLine: false };
    code.tail = document.createTextNode("");
    head.append(this.#copyButton(() => code.pieces.join("") + code.tail.data));
    this.#state.code = code;
  }

  #codeLine(code, line, isWhole) {
    const closing = code.isMidLine || line.length > CERTAIN ? null : /^[ \t]*(`{3,}|~{3,})[ \t]*$/.exec(line);
    if (isWhole && closing && closing[1][0] === code.fence[0] && closing[1].length >= code.fence.length) {
      code.tail.data = "";
      this.#state.code = null;
    } else {
      this.#codeText(code, isWhole ? "\n" : "", line, !isWhole);
    }
  }

  #codeText(code, end, line, isMidLine) {
    const text = (code.isMidLine ? line : unindent(line, code.indent)) + end;
    code.isMidLine = isMidLine;
    code.tail.data = "";
    if (!text) return;
    code.pieces.push(text);
    this.#box(code);
    code.box.appendData(text);
    if (end) code.lines += 1;
  }

  /** Makes room for more code, and gives the node for the line that is being written. */
  #box(code) {
    if (!code.box || code.lines >= LINES_A_BOX) {
      const span = code.element.appendChild(document.createElement("span"));
      code.box = span.appendChild(document.createTextNode(""));
      span.append(code.tail);
      code.lines = 0;
    }
    return code.tail;
  }
}

/** Columns of a run of spaces and tabs (a tab counts four). */
const width = (blank) => blank.replaceAll("\t", "    ").length;

/** A line of code without the indentation that its fence has. */
function unindent(line, indent) {
  let start = 0;
  while (start < indent && line[start] === " ") start += 1;
  return line.slice(start);
}
