/** One question and its answer: what was said, and how it looks. */

import { MarkdownView } from "./markdown.js";

/** A node with a class, a text and attributes. */
export function make(tag, name, text = "", attributes = {}) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

/** Puts a text on the clipboard, also where the page was not loaded over a safe channel. */
async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const before = document.activeElement;
  const holder = document.body.appendChild(make("textarea", "unseen", "", { readonly: "", "aria-hidden": "true" }));
  holder.value = text;
  holder.select();
  const isDone = document.execCommand("copy");
  holder.remove();
  before?.focus();
  if (!isDone) throw new Error("the browser allows no copying");
}

/** A button that copies what `source` gives, and says so. */
export function copyButton(source, label, say) {
  const button = make("button", "quiet", "Copy", { type: "button", "aria-label": label });
  button.addEventListener("click", async () => {
    let told = "Copied";
    try {
      await copy(source());
    } catch {
      told = "Not copied: the browser does not allow it";
    }
    button.textContent = told;
    say(told);
    setTimeout(() => {
      button.textContent = "Copy";
    }, 1600);
  });
  return button;
}

export class Turn {
  question;
  answer = "";
  /** What else is to be said about the answer: stopped, cut, an error. */
  note = "";
  isError = false;
  /** Tokens, time to the first, tokens a second; as one line. */
  facts = "";

  /** @param {object} actions {say(text), edit(), again()} */
  constructor(question, actions) {
    this.question = question;
    this.actions = actions;
    this.node = make("article", "turn");
    const asked = this.node.appendChild(make("div", "said by-user"));
    asked.append(make("h2", "who", "You"), make("div", "text", question));
    this.editButton = make("button", "quiet", "Edit", { type: "button", "aria-label": "Edit your last message" });
    this.editButton.addEventListener("click", actions.edit);
    asked.append(this.editButton);
    const answered = this.node.appendChild(make("div", "said by-model"));
    this.whoNode = answered.appendChild(make("h2", "who"));
    this.body = answered.appendChild(make("div", "text rich"));
    this.noteNode = answered.appendChild(make("p", "note", "", { hidden: "" }));
    const under = answered.appendChild(make("div", "under", "", { "aria-live": "off" }));
    this.copyButton = copyButton(() => this.answer, "Copy the answer", actions.say);
    this.againButton = make("button", "quiet", "Again", { type: "button", "aria-label": "Generate the answer again" });
    this.againButton.addEventListener("click", actions.again);
    this.factsNode = make("span", "facts");
    under.append(this.copyButton, this.againButton, this.factsNode);
    this.#view();
  }

  /** A turn as `saved` gave it; null if it is none. */
  static restored(saved, actions) {
    if (typeof saved?.question !== "string" || typeof saved.answer !== "string") return null;
    const turn = new Turn(saved.question, actions);
    turn.begin(String(saved.model ?? ""));
    turn.append(saved.answer);
    turn.finish(String(saved.note ?? ""), Boolean(saved.isError), String(saved.facts ?? ""));
    return turn;
  }

  get saved() {
    const { question, answer, note, isError, facts } = this;
    return { question, answer, note, isError, facts, model: this.whoNode.textContent };
  }

  /** Empties the answer: a new one is on its way. */
  begin(model) {
    this.answer = this.note = this.facts = "";
    this.isError = false;
    this.name(model);
    this.noteNode.hidden = true;
    this.factsNode.textContent = "";
    this.#view();
    this.body.setAttribute("aria-busy", "true");
    this.node.classList.add("running");
  }

  /** Says who answers. */
  name(model) {
    this.whoNode.textContent = this.whoNode.title = model;
  }

  append(text) {
    this.answer += text;
    this.view.append(text);
  }

  showFacts(facts) {
    this.facts = facts;
    this.factsNode.textContent = facts;
  }

  finish(note, isError, facts) {
    this.view.end();
    this.body.removeAttribute("aria-busy");
    this.node.classList.remove("running");
    this.note = note;
    this.isError = isError;
    this.noteNode.textContent = note;
    this.noteNode.hidden = !note;
    this.noteNode.classList.toggle("wrong", isError);
    this.showFacts(facts);
  }

  /** Only the last turn can be changed, and only while nothing is being generated. */
  offer(isLast, isIdle) {
    this.editButton.hidden = this.againButton.hidden = !(isLast && isIdle);
    this.copyButton.hidden = !this.answer || (isLast && !isIdle);
  }

  #view() {
    this.body.replaceChildren();
    this.view = new MarkdownView(this.body, (source) => copyButton(source, "Copy the code", this.actions.say));
  }
}
