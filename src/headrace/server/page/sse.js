/** Server-sent events, as the OpenAI routes write them: text in pieces of any size -> the data of each event. */

/** Takes text in pieces and gives back the data of every event that is whole. Comments and other fields are skipped. */
export class EventReader {
  #rest = "";
  #lines = [];
  #afterReturn = false;

  /** @param {string} text the next piece  @returns {string[]} data of the events that it completes */
  push(text) {
    // A line may end in \r\n that is cut between two pieces: the \n then belongs to the line before.
    const isCut = this.#afterReturn && text.startsWith("\n");
    if (text) this.#afterReturn = text.endsWith("\r");
    if (isCut) text = text.slice(1);
    const lines = text.split(/\r\n|\n|\r/);
    lines[0] = this.#rest + lines[0];
    this.#rest = lines.pop();
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#lines.length) events.push(this.#lines.join("\n"));
        this.#lines = [];
      } else if (line.startsWith("data:")) {
        this.#lines.push(line.slice(line.startsWith("data: ") ? 6 : 5));
      }
    }
    return events;
  }
}

/** @param {ReadableStream<Uint8Array>} body  @yields {string} the data of one event */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const events = new EventReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* events.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    // Whoever stops reading early also stops the request, so that the server frees what it holds.
    reader.cancel().catch(() => {});
  }
}
