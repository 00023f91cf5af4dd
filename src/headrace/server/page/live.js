/** The line about the server's load: asked for once a second while the page is in view. */

import { live } from "./api.js";

const EVERY_MS = 1000;
const AFTER_FAILURE_MS = 3000;
const byId = (id) => document.getElementById(id);

/** @param {() => string} key gives the API key  @returns {() => void} asks at once */
export function watchLoad(key) {
  let timer = 0;
  let isAsking = false;
  const ask = async () => {
    clearTimeout(timer);
    if (document.hidden || isAsking) return;
    isAsking = true;
    let wait = EVERY_MS;
    try {
      show(await live(key()));
    } catch (error) {
      wait = AFTER_FAILURE_MS;
      if (error.status === 401) say("locked", "needs an API key");
      else say("down", error.status ? "load unknown" : "not reachable");
    } finally {
      isAsking = false;
    }
    timer = setTimeout(ask, wait);
  };
  document.addEventListener("visibilitychange", ask);
  ask();
  return ask;
}

function show(load) {
  const speed = Number(load.tokens_per_s) || 0;
  const figures = [
    `${Number(load.running) || 0} running`,
    `${Number(load.waiting) || 0} waiting`,
    `${speed && speed < 10 ? speed.toFixed(1) : Math.round(speed)} tok/s`,
  ];
  if (!load.ready) say("starting", "not ready");
  else say(load.running > 0 ? "busy" : "idle", ...figures);
}

function say(state, ...parts) {
  byId("live").dataset.state = state;
  const spans = parts.map((part) => {
    const span = document.createElement("span");
    span.textContent = part;
    return span;
  });
  byId("live-text").replaceChildren(...spans);
}
