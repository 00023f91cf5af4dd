/** The panel of sampling settings: reads and checks them, and keeps them for as long as the tab is open. */

import { recall, remember } from "./memory.js";

const NUMBERS = {
  temperature: "Temperature",
  "top-p": "Top-p",
  "top-k": "Top-k",
  "max-tokens": "Max tokens",
  seed: "Seed",
};
const SLIDERS = ["temperature", "top-p"];
const ALL = [...Object.keys(NUMBERS), "system-prompt"];
const byId = (id) => document.getElementById(id);

export class Settings {
  constructor() {
    const kept = recall("settings", {});
    for (const id of ALL) {
      if (typeof kept[id] === "string") byId(id).value = kept[id];
      byId(id).addEventListener("input", () => this.#changed(id));
      if (id in NUMBERS) showComplaint(id);
    }
    for (const id of SLIDERS) {
      const slider = byId(`${id}-slider`);
      slider.addEventListener("input", () => {
        byId(id).value = slider.value;
        this.#changed(id);
      });
      this.#moveSlider(id);
    }
    byId("reset").addEventListener("click", () => {
      for (const id of ALL) {
        byId(id).value = "";
        this.#changed(id);
      }
    });
  }

  /** Names of the models to choose from; a choice is offered only where there is one. */
  offerModels(names) {
    const chosen = byId("model").value;
    byId("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
    byId("model-field").hidden = names.length < 2;
  }

  /** @returns {string} */
  get model() {
    return byId("model").value;
  }

  /** @returns {string} */
  get systemPrompt() {
    return byId("system-prompt").value.trim();
  }

  /** @returns {HTMLInputElement|null} the first field with a value that the server would refuse */
  firstWrong() {
    return Object.keys(NUMBERS).map((id) => (complaint(id) ? byId(id) : null)).find(Boolean) ?? null;
  }

  /** @returns {object} the fields of a request; those left empty are the server's to choose */
  sampling() {
    const fields = {};
    for (const id of Object.keys(NUMBERS)) {
      if (byId(id).value !== "") fields[id.replace("-", "_")] = byId(id).valueAsNumber;
    }
    return fields;
  }

  #changed(id) {
    if (id in NUMBERS) showComplaint(id);
    if (SLIDERS.includes(id)) this.#moveSlider(id);
    remember("settings", Object.fromEntries(ALL.map((one) => [one, byId(one).value])));
  }

  #moveSlider(id) {
    const slider = byId(`${id}-slider`);
    slider.value = byId(id).value || slider.dataset.rest;
    slider.classList.toggle("unset", byId(id).value === "");
  }
}

function showComplaint(id) {
  const wrong = complaint(id);
  byId(id).setAttribute("aria-invalid", String(Boolean(wrong)));
  byId(`${id}-error`).textContent = wrong;
}

/** What is wrong with a number, in the words of a user; empty if nothing is. */
function complaint(id) {
  const input = byId(id);
  const { validity, min, max, valueAsNumber } = input;
  const isTooLow = validity.rangeUnderflow || ("above" in input.dataset && valueAsNumber === Number(min));
  if (!validity.badInput && !validity.rangeOverflow && !validity.stepMismatch && !isTooLow) return "";
  const kind = input.step === "1" ? "a whole number" : "a number";
  const range = "above" in input.dataset ? `above ${min}, up to ${max}` : `from ${min} to ${max}`;
  return `${NUMBERS[id]}: ${kind} ${range}.`;
}
