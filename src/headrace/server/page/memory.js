/** What the tab remembers until it is closed. Where the browser allows no storage, nothing is kept. */

const PREFIX = "headrace.";

/** @returns {any} what was remembered under a name, else `otherwise` */
export function recall(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Remembers a value; null forgets it. */
export function remember(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(PREFIX + name);
    else sessionStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Storage is off or full: the page works without.
  }
}
