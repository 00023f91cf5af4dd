/** The marks inside a line: `code`, **strong** and *emphasis*. Made of DOM nodes: text stays text whatever it says. */

const MARK = /\\[!-/:-@[-`{-~]|`+|\*+|_+/g;
const DEEPEST = 8;
const isSpace = (char) => char === "" || /\s/.test(char);
const isWord = (char) => /[\p{L}\p{N}_]/u.test(char);

/**
 * Appends a text with its marks to `parent`.
 * @param {boolean} isOpen more text may follow: strong and code that are begun and not ended are shown as such
 */
export function appendInline(parent, text, isOpen) {
  const open = [];
  let into = parent;
  let plain = "";
  let position = 0;

  const flush = () => {
    if (plain) into.append(plain);
    plain = "";
  };
  const leave = () => {
    into = open.length ? open.at(-1).inner : parent;
  };
  const unwrap = () => {
    const { outer, inner, mark } = open.pop();
    outer.replaceWith(mark, ...inner.childNodes);
    leave();
  };
  const enter = (mark) => {
    flush();
    const outer = document.createElement(mark.length === 1 ? "em" : "strong");
    const inner = mark.length === 3 ? outer.appendChild(document.createElement("em")) : outer;
    into.append(outer);
    open.push({ outer, inner, mark });
    leave();
  };
  const close = (index) => {
    flush();
    while (open.length > index + 1) unwrap();
    open.pop();
    leave();
  };

  for (const match of text.matchAll(MARK)) {
    if (match.index < position) continue;
    plain += text.slice(position, match.index);
    const mark = match[0];
    const after = match.index + mark.length;
    position = after;
    if (mark[0] === "\\") {
      plain += mark[1];
    } else if (mark[0] === "`") {
      const end = closingRun(text, mark, after);
      if (end < 0 && !(isOpen && after < text.length)) {
        plain += mark;
        continue;
      }
      flush();
      const code = document.createElement("code");
      code.textContent = text.slice(after, end < 0 ? text.length : end).replace(/^ (.*[^ ].*) $/s, "$1");
      into.append(code);
      position = end < 0 ? text.length : end + mark.length;
    } else {
      let left = mark;
      const before = text[match.index - 1] ?? "";
      const next = text[after] ?? "";
      const isInWord = mark[0] === "_" && isWord(before) && isWord(next);
      while (left && !isInWord && !isSpace(before)) {
        const index = open.findLastIndex((one) => one.mark[0] === left[0] && one.mark.length <= left.length);
        if (index < 0) break;
        const { length } = open[index].mark;
        close(index);
        left = left.slice(length);
      }
      const mayOpen = left && left.length <= 3 && !isSpace(next) && !(left[0] === "_" && isWord(before));
      if (mayOpen && open.length < DEEPEST) enter(left);
      else plain += left;
    }
  }
  plain += text.slice(position);
  flush();
  while (open.length && !(isOpen && open.at(-1).mark.length === 2)) unwrap();
}

/** Where the run of backticks of just this length begins that ends a code span; -1: nowhere. */
function closingRun(text, run, from) {
  for (let at = text.indexOf(run, from); at >= 0; at = text.indexOf(run, at)) {
    let end = at + run.length;
    if (text[end] !== "`") return at;
    while (text[end] === "`") end += 1;
    at = end;
  }
  return -1;
}
