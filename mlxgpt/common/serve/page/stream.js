"use strict";
// Asks the server, and reads its stream of events piece by piece.

// Splits the text of an event stream into the data of its events, wherever the chunks end.
class Events {
  #rest = "";
  #data = [];
  #begun = false;

  // The data of every event that ends in `text`.
  push(text) {
    this.#rest += text;
    if (!this.#begun && this.#rest) {
      this.#begun = true;
      if (this.#rest.startsWith("\uFEFF")) this.#rest = this.#rest.slice(1);
    }
    const events = [];
    for (;;) {
      const end = this.#rest.search(/[\r\n]/);
      // a \r at the end may be the first half of \r\n
      if (end < 0 || (this.#rest[end] === "\r" && end + 1 === this.#rest.length)) return events;
      const line = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end + (this.#rest.startsWith("\r\n", end) ? 2 : 1));
      if (!line) {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line === "data" || line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      } // comments, which begin with a colon, and other fields say nothing here
    }
  }
}

class Failure extends Error {
  // after: seconds that the server asks to wait; field: that holds what is wrong
  constructor(message, { status = 0, after = 0, field = null } = {}) {
    super(message);
    Object.assign(this, { status, after, field });
  }
}

// What stays in this tab, as text; where a browser keeps nothing, until the page is left.
const kept = {
  here: {},

  get(name) {
    try {
      return sessionStorage.getItem(name) ?? this.here[name] ?? "";
    } catch {
      return this.here[name] ?? "";
    }
  },

  // Whether it is kept.
  set(name, text) {
    try {
      sessionStorage.setItem(name, text);
      return true;
    } catch {
      if (text.length < 1000) this.here[name] = text;
      return false;
    }
  },
};
const KEY = "mlxgpt key";

// The answer to a request.
// Throws Failure with the server's words; an AbortError when it was stopped.
async function ask(path, body, signal) {
  const headers = { Accept: body ? "text/event-stream" : "application/json" };
  if (body) headers["Content-Type"] = "application/json";
  const key = kept.get(KEY);
  if (/[^\x21-\x7e]/.test(key)) throw new Failure("A key has only letters, digits and signs of ASCII.", { status: 401 });
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body, signal, redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  let words = "";
  try {
    words = (await answer.json()).error.message;
  } catch {
    // something between here and the server answered
  }
  const after = Number(answer.headers.get("Retry-After")) || 0;
  throw new Failure(words || `The server answered ${answer.status} ${answer.statusText}.`, { status: answer.status, after });
}

// The objects of a stream, up to [DONE].
// Throws Failure when the server says an error, or the stream ends before it is done.
async function* stream(path, body, signal) {
  const answer = await ask(path, body, signal);
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  const events = new Events();
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Failure("The connection broke before the answer was complete.");
      }
      const text = decoder.decode(piece.value, { stream: !piece.done });
      // at the end of all, a \r is a whole line's end
      for (const data of events.push(piece.done ? `${text}\n` : text)) {
        if (data === "[DONE]") return;
        let said;
        try {
          said = JSON.parse(data);
        } catch {
          throw new Failure("The server sent something that is not JSON.");
        }
        if (said.error) throw new Failure(said.error.message || "The server failed.");
        yield said;
      }
      if (piece.done) throw new Failure("The connection ended before the answer was complete.");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
