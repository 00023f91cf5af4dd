/** The server's routes, as this page uses them. Every failure is an ApiError whose message can be shown as it is. */

import { readEvents } from "./sse.js";

export class ApiError extends Error {
  /** @param {string} message  @param {number} status HTTP status, 0 where there was no answer */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const LOST = "The connection ended before the answer was complete.";

async function request(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "same-origin", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  throw new ApiError(await refusal(response), response.status);
}

/** What the server says about an answer that is no success, with when to come again where it says so. */
async function refusal(response) {
  let message = "";
  try {
    const { error } = JSON.parse(await response.text());
    message = typeof error === "string" ? error : error?.message ?? "";
  } catch (error) {
    if (error.name === "AbortError") throw error; // any other: a body that is cut or no JSON; the status says enough
  }
  message ||= `The server answered ${response.status} ${response.statusText}`.trimEnd() + ".";
  const wait = Number(response.headers.get("retry-after"));
  return wait > 0 ? `${message} Try again in ${wait} s.` : message;
}

async function json(path, key) {
  const response = await request(path, key);
  try {
    return await response.json();
  } catch {
    throw new ApiError(`${path}: the answer is no JSON.`, response.status);
  }
}

/** @returns {Promise<string[]>} names of the models, the server's own first */
export async function models(key) {
  const { data } = await json("v1/models", key);
  return Array.isArray(data) ? data.map((one) => String(one.id)) : [];
}

/** @returns {Promise<{running: number, waiting: number, tokens_per_s: number, ready: boolean}>} */
export const live = (key) => json("page/live.json", key);

/**
 * One streamed chat completion.
 * @param {object} body what is sent  @param {string} key  @param {AbortSignal} signal
 * @yields {object} each chunk. Throws ApiError, or AbortError once the signal is given.
 */
export async function* chat(body, key, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? String(chunk.error), response.status);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(LOST);
  }
  throw new ApiError(LOST);
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("The server sent an event that is no JSON.");
  }
}
