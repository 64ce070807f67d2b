"use strict";
// Messages as elements. What they can do is in `acts`, which app.js fills.

const acts = {};
const SLOW = 100; // ms between two renderings of an answer that grows, at the least

const REASONS = {
  length: "cut off: max tokens, or the context is full",
  stopped: "stopped",
  tool_calls: "calls tools",
};

// The element of an answer, which is drawn anew while it grows.
class AnswerView {
  #text;
  #writer;
  #timer = 0;
  #wrapped = false;
  #asTokens = false;

  constructor(message, answer, two) {
    this.message = message;
    this.answer = answer;
    this.who = make("h3", "who", answer.model || "assistant");
    this.thought = make("pre", "thought");
    this.reasoning = make("details", "reasoning", make("summary", "", "Reasoning"), this.thought);
    this.#text = make("div", `text${talk.asText ? " plain" : ""}`);
    this.#writer = talk.asText ? new Plain(this.#text) : new Markdown(this.#text);
    this.tokens = make("div", "tokens");
    this.tokens.setAttribute("role", "group");
    this.tokens.setAttribute("aria-label", "Tokens of this answer; arrow keys go from one to the next");
    this.legend = make("p", "legend", "Probability ");
    [...LEVELS.map((border) => `≥ ${100 * border} %`), "less"].forEach((words, place) => {
      this.legend.append(make("span", `token level${place}`, words));
    });
    this.calls = make("div", "calls");
    this.error = make("div", "error");
    this.meta = make("p", "meta");
    this.actions = make("div", "actions");
    this.element = make("article", "side", this.who, this.reasoning, this.#text, this.legend, this.tokens);
    this.element.append(this.calls, this.error, this.meta, this.actions);
    this.two = two;
    for (const element of [this.#text, this.tokens]) watchTokens(element, answer);
    this.#text.addEventListener("pointerenter", () => this.#wrap());
    this.draw();
  }

  // Draws soon; a long answer, which takes longer to draw, less often.
  soon() {
    if (this.#timer) return;
    this.#timer = setTimeout(() => {
      this.#timer = 0;
      const before = performance.now();
      this.draw();
      acts.grown();
      this.slow = Math.max(SLOW, 4 * (performance.now() - before));
    }, this.slow || 0);
  }

  draw() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.slow ||= SLOW;
    const { answer } = this;
    const ended = answer.state !== "going";
    if (!this.#wrapped) this.#writer.show(answer.content);
    this.element.classList.toggle("going", !ended);
    this.#text.classList.toggle("waits", !ended && !answer.content);
    this.element.setAttribute("aria-busy", String(!ended));
    this.reasoning.hidden = !answer.reasoning;
    if (this.thought.textContent.length !== answer.reasoning.length) this.thought.textContent = answer.reasoning;
    this.calls.replaceChildren(...answer.calls.filter(Boolean).map(drawCall));
    this.#text.hidden = this.#asTokens;
    this.tokens.hidden = this.legend.hidden = !this.#asTokens;
    if (this.#asTokens) drawTokens(this.tokens, answer);
    this.#end(ended);
  }

  #wrap() {
    if (this.#wrapped || this.answer.state === "going" || !this.answer.tokens.length) return;
    this.#wrapped = true;
    wrapTokens(this.#text, this.answer);
  }

  #end(ended) {
    const { answer, message } = this;
    this.meta.replaceChildren();
    this.error.replaceChildren();
    this.actions.replaceChildren();
    if (!ended) return;
    if (answer.error) {
      const retry = button("Try again", () => acts.retry(message, answer), "small");
      this.error.append(make("p", "", answer.error), retry);
    }
    const said = [REASONS[answer.state] || REASONS[answer.reason]].filter(Boolean);
    const count = answer.usage?.completion_tokens ?? answer.tokens.length;
    if (count) said.push(`${count.toLocaleString("en")} token${count === 1 ? "" : "s"}`);
    if (count > 1 && answer.seconds > answer.first) {
      const pace = (count - 1) / (answer.seconds - answer.first);
      said.push(`${pace.toLocaleString("en", { maximumFractionDigits: pace < 100 ? 1 : 0 })} tokens/s`);
    }
    this.meta.append(said.join(" · "));
    if (answer.seed !== "") {
      const pin = button(`seed ${answer.seed}`, () => acts.pin(answer.seed), "link", "Use this seed from now on");
      this.meta.append(said.length ? " · " : "", pin);
    }
    if (says(answer)) {
      const copied = button("Copy", () => copy(answer.content, copied), "small");
      this.actions.append(copied, button("Edit", () => acts.edit(message, this), "small change"));
    }
    if (answer.tokens.length) {
      const tokens = button("Tokens", () => this.#turn(), "small turn", "Each token with its probability");
      tokens.setAttribute("aria-pressed", String(this.#asTokens));
      this.actions.append(tokens);
    }
    if (this.two) {
      const on = chosen(message) === answer;
      const choose = button("Go on from this", () => acts.choose(message, answer), "small");
      choose.setAttribute("aria-pressed", String(on));
      this.element.classList.toggle("chosen", on);
      this.actions.append(choose);
    } else {
      this.actions.append(button("Regenerate", () => acts.regenerate(message), "small"));
    }
  }

  #turn() {
    this.#asTokens = !this.#asTokens;
    tip.hide();
    this.draw();
    this.actions.querySelector(".turn").focus();
  }
}

function drawCall(call) {
  let written = call.function.arguments;
  try {
    written = JSON.stringify(JSON.parse(written), null, 2);
  } catch {
    // not whole yet, or no JSON: as it is
  }
  return make("div", "call", make("p", "", "Calls ", make("b", "", call.function.name)), make("pre", "", written));
}

// Fields for what the called tools returned, below the last answer.
function drawResults(message) {
  const form = make("form", "results");
  const fields = chosen(message).calls.map((call) => {
    const field = make("textarea");
    field.rows = 2;
    form.append(make("label", "", `What ${call.function.name} returned`, field));
    return [call.id, field];
  });
  const send = make("button", "", "Send results");
  form.append(send);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    acts.results(fields.map(([id, field]) => ({ role: "tool", id, content: field.value })));
  });
  return form;
}

// The element of a message, and the views of its answers; `asks`: for what its tools returned.
function drawMessage(message, asks) {
  if (!message.sides) {
    const names = { user: talk.asText ? "Text" : "You", tool: "Result of a tool", system: "System", developer: "System" };
    const made = make("li", `message ${message.role}`, make("h3", "who away", names[message.role] || message.role));
    const body = make("div", "bubble", message.content);
    const actions = make("div", "actions");
    if (message.role === "tool") made.firstChild.classList.remove("away");
    made.append(body, actions);
    const copied = button("Copy", () => copy(message.content, copied), "small");
    actions.append(button("Edit", () => acts.edit(message, { element: made, content: body }), "small change"), copied);
    return { element: made, views: [] };
  }
  const two = message.sides.length > 1;
  const views = message.sides.map((answer) => new AnswerView(message, answer, two));
  const sides = make("div", "sides", ...views.map((view) => view.element));
  const element = make("li", `message assistant${two ? " two" : ""}`, sides);
  if (two) {
    element.append(make("div", "actions both", button("Regenerate both", () => acts.regenerate(message), "small")));
  }
  if (asks) element.append(drawResults(message));
  return { element, views };
}

// Puts a field for `text` in the place of `hidden`; `done` gets what was written.
function editor(holder, text, words, done) {
  const field = make("textarea", "edit");
  field.value = text;
  field.setAttribute("aria-label", "Edit this message");
  const form = make("form", "editor", field);
  const close = () => {
    form.remove();
    holder.classList.remove("edited");
    holder.querySelector(".actions button")?.focus();
  };
  const save = make("button", "main small", words);
  form.append(make("div", "row", save, button("Cancel", close, "small")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    close();
    done(field.value);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  holder.classList.add("edited");
  holder.prepend(form);
  field.style.height = `${Math.min(400, Math.max(80, field.scrollHeight + 4))}px`;
  field.focus();
  field.setSelectionRange(text.length, text.length);
}
