/** The page: asks, shows the answer while it comes, and keeps the conversation for as long as the tab is open. */

import { ApiError, chat, models } from "./api.js";
import { watchLoad } from "./live.js";
import { recall, remember } from "./memory.js";
import { Settings } from "./settings.js";
import { Turn } from "./turn.js";

const byId = (id) => document.getElementById(id);
const [log, message, composer] = ["log", "message", "composer"].map(byId);
const isNarrow = window.matchMedia("(max-width: 60rem)");
const hasKeyboard = window.matchMedia("(pointer: fine)");
const settings = new Settings();
const actions = { say, edit: startEditing, again: () => answer(turns.at(-1)) };

let turns = [];
let run = null;
let key = recall("key", "");
let names = [];
let isFollowing = true;
let isAwaitingKey = false;
let draft = null;

const askLoad = watchLoad(() => key);

function say(text) {
  byId("status").textContent = text;
}

// --- the conversation

function messages(last) {
  const told = [];
  if (settings.systemPrompt) told.push({ role: "system", content: settings.systemPrompt });
  for (const turn of turns) {
    if (turn === last) break;
    // Models expect questions and answers by turns: a question that got no answer is left out.
    if (!turn.answer) continue;
    told.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.answer });
  }
  told.push({ role: "user", content: last.question });
  return told;
}

function send() {
  const question = message.value;
  if (run || !question.trim() || complainOfSettings()) return;
  if (draft !== null) {
    turns.pop().node.remove();
    endEditing("");
  }
  message.value = "";
  fitMessage();
  const turn = new Turn(question, actions);
  turns.push(turn);
  log.append(turn.node);
  isFollowing = true;
  answer(turn);
}

function complainOfSettings() {
  const wrong = settings.firstWrong();
  byId("message-error").textContent = wrong ? byId(`${wrong.id}-error`).textContent : "";
  if (!wrong) return false;
  showSettings(true);
  wrong.focus();
  return true;
}

async function answer(turn) {
  if (run || complainOfSettings()) return;
  const mine = { controller: new AbortController(), turn, text: "", frame: 0, facts: new Facts(), finish: "" };
  run = mine;
  turn.begin(settings.model || "model");
  showBusy();
  follow();
  let note = "";
  let isError = false;
  try {
    await stream(mine);
    if (mine.finish === "length") note = "Cut at the limit of tokens.";
    if (!turn.answer && !mine.text) note ||= "The model ended its answer before the first character.";
  } catch (error) {
    if (error.name === "AbortError") {
      note = "Stopped.";
    } else {
      isError = true;
      note = error instanceof ApiError ? error.message : `The page failed: ${error.message}`;
      if (error.status === 401) askForKey(true);
      if (error.status === 404) names = []; // another model is served by now: ask again which
    }
  }
  cancelAnimationFrame(mine.frame);
  turn.append(mine.text);
  turn.finish(note, isError, mine.facts.line);
  if (run !== mine) return;
  run = null;
  showBusy();
  follow();
  save();
  askLoad();
  say(note || "Answer complete.");
}

async function stream(mine) {
  if (!names.length) await loadModels();
  mine.turn.name(settings.model);
  const body = {
    model: settings.model,
    messages: messages(mine.turn),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...settings.sampling(),
  };
  mine.facts.start();
  for await (const chunk of chat(body, key, mine.controller.signal)) {
    const choice = chunk.choices?.[0];
    mine.finish = choice?.finish_reason ?? mine.finish;
    mine.facts.heard(Boolean(choice?.delta?.content), chunk.usage?.completion_tokens);
    mine.text += choice?.delta?.content ?? "";
    mine.frame ||= requestAnimationFrame(() => draw(mine));
  }
}

/** At most once a frame, whatever has come since the last. */
function draw(mine) {
  mine.frame = 0;
  mine.turn.append(mine.text);
  mine.text = "";
  mine.turn.showFacts(mine.facts.line);
  follow();
}

/** Tokens of an answer, seconds to the first, and tokens a second after it. */
class Facts {
  #asked = 0;
  #first = null;
  #last = null;

  start() {
    this.#asked = performance.now();
  }

  heard(hasText, tokens) {
    if (!hasText && !this.#first) return;
    const now = { at: performance.now(), tokens };
    this.#first ??= now;
    if (tokens > (this.#last?.tokens ?? 0)) this.#last = now;
  }

  get line() {
    const parts = [];
    const tokens = this.#last?.tokens;
    if (tokens) parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
    const more = tokens - this.#first?.tokens;
    const seconds = (this.#last?.at - this.#first?.at) / 1000;
    if (more > 0 && seconds > 0) parts.push(`${(more / seconds).toFixed(1)} tok/s`);
    if (this.#first) parts.push(`first token ${((this.#first.at - this.#asked) / 1000).toFixed(2)} s`);
    return parts.join(" · ");
  }
}

function stop() {
  run?.controller.abort();
}

function newChat() {
  const old = run;
  run = null;
  old?.controller.abort();
  if (draft !== null) endEditing("");
  for (const turn of turns) turn.node.remove();
  turns = [];
  byId("message-error").textContent = "";
  save();
  showBusy();
  message.focus();
  say("New chat.");
}

function save() {
  remember("chat", turns.length ? turns.map((turn) => turn.saved) : null);
}

function restore() {
  const kept = recall("chat", []);
  turns = (Array.isArray(kept) ? kept : []).map((one) => Turn.restored(one, actions)).filter(Boolean);
  log.append(...turns.map((turn) => turn.node));
}

// --- the last message, changed

function startEditing() {
  if (run || !turns.length) return;
  draft ??= message.value;
  message.value = turns.at(-1).question;
  byId("editing").hidden = false;
  fitMessage();
  message.focus();
}

function endEditing(text) {
  message.value = text;
  draft = null;
  byId("editing").hidden = true;
  fitMessage();
}

// --- what is seen

function showBusy() {
  const isBusy = Boolean(run);
  const focused = document.activeElement;
  composer.dataset.busy = String(isBusy);
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
  byId("empty").hidden = turns.length > 0;
  for (const turn of turns) turn.offer(turn === turns.at(-1), !isBusy);
  // Whoever pressed a button that is gone now goes on from the one in its place.
  if (focused?.closest("[hidden]")) {
    if (isBusy) byId("stop").focus();
    else if (hasKeyboard.matches) message.focus();
    else byId("send").focus();
  }
}

function follow() {
  if (isFollowing) log.scrollTop = log.scrollHeight;
  byId("jump").hidden = isFollowing;
}

function fitMessage() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
}

function showSettings(isShown) {
  document.body.dataset.settings = isShown ? "open" : "closed";
  byId("open-settings").setAttribute("aria-expanded", String(isShown));
  const covers = isShown && isNarrow.matches;
  document.querySelector("main").inert = covers;
  document.querySelector(".bar").inert = covers;
  if (covers) byId("close-settings").focus();
}

function closeSettings() {
  showSettings(false);
  byId("open-settings").focus();
}

// --- key and models

async function loadModels() {
  names = await models(key);
  settings.offerModels(names);
  byId("model-name").textContent = settings.model;
  document.title = settings.model ? `${settings.model} · headrace` : "headrace";
}

function askForKey(isForAnswer) {
  isAwaitingKey ||= isForAnswer;
  byId("key-error").textContent = key ? "The server does not accept this key." : "";
  byId("key-form").hidden = false;
  byId("key").focus();
}

async function takeKey() {
  const given = byId("key").value.trim();
  if (!/^[!-~]+$/.test(given)) {
    byId("key-error").textContent = "A key has letters, digits and signs only, without spaces.";
    return;
  }
  key = given;
  try {
    await loadModels();
  } catch (error) {
    if (error.status === 401) key = "";
    byId("key-error").textContent = error.status === 401 ? "The server does not accept this key." : error.message;
    byId("key").select();
    return;
  }
  remember("key", key);
  byId("key").value = "";
  byId("key-form").hidden = true;
  byId("forget-key").hidden = false;
  askLoad();
  message.focus();
  if (isAwaitingKey && turns.length) answer(turns.at(-1));
  isAwaitingKey = false;
}

function forgetKey() {
  key = "";
  names = [];
  remember("key", null);
  byId("forget-key").hidden = true;
  say("API key forgotten.");
  begin();
}

async function begin() {
  byId("forget-key").hidden = !key;
  try {
    await loadModels();
  } catch (error) {
    if (error.status === 401) askForKey(false);
    else byId("message-error").textContent = error.message;
  }
}

// --- events

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("keydown", (event) => {
  const isComposing = event.isComposing || event.keyCode === 229;
  if (event.key !== "Enter" || event.shiftKey || isComposing) return;
  event.preventDefault();
  send();
});
message.addEventListener("input", () => {
  byId("message-error").textContent = "";
  fitMessage();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (isNarrow.matches && document.body.dataset.settings === "open") closeSettings();
  else if (run) stop();
  else if (draft !== null) endEditing(draft);
});
log.addEventListener("scroll", () => {
  isFollowing = log.scrollHeight - log.scrollTop - log.clientHeight < 24;
  byId("jump").hidden = isFollowing;
});
byId("jump").addEventListener("click", () => {
  isFollowing = true;
  follow();
  message.focus();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  takeKey();
});
byId("model").addEventListener("change", () => {
  byId("model-name").textContent = settings.model;
});
byId("stop").addEventListener("click", stop);
byId("new-chat").addEventListener("click", newChat);
byId("cancel-edit").addEventListener("click", () => {
  endEditing(draft);
  message.focus();
});
byId("open-settings").addEventListener("click", () => showSettings(document.body.dataset.settings !== "open"));
byId("close-settings").addEventListener("click", closeSettings);
byId("forget-key").addEventListener("click", forgetKey);
isNarrow.addEventListener("change", () => showSettings(!isNarrow.matches));

showSettings(!isNarrow.matches);
restore();
showBusy();
follow();
fitMessage();
begin();
