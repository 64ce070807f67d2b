"use strict";
// The conversation: its messages, what of them a request says, and the file that it is saved as.
//
// A message is {role, content}; an assistant's is {role, sides, chosen}: one answer, or two to the same messages, of
// which the chosen one is what the conversation goes on from.

const talk = { system: "", messages: [], models: [], asText: false };

const newAnswer = (model, content = "") => ({
  model, content, reasoning: "", calls: [], tokens: [], seed: "", reason: "", usage: null, error: "", after: 0,
  seconds: 0, first: 0, state: "",
});

const chosen = (message) => message.sides[message.chosen];
const contentOf = (message) => (message.sides ? chosen(message).content : message.content);
const says = (answer) => answer.content.trim() !== "" || answer.calls.length > 0;

// The messages before `end` as a request has them; a question that got no answer is left out, but for the last.
function context(end = talk.messages.length) {
  const made = talk.system.trim() ? [{ role: "system", content: talk.system }] : [];
  talk.messages.slice(0, end).forEach((message, place) => {
    const next = talk.messages[place + 1];
    if (message.sides) {
      const answer = chosen(message);
      if (!says(answer)) return;
      const one = { role: "assistant", content: answer.content };
      if (answer.reasoning) one.reasoning_content = answer.reasoning;
      if (answer.calls.length) one.tool_calls = answer.calls;
      made.push(one);
    } else if (message.role === "tool") {
      made.push({ role: "tool", tool_call_id: message.id, content: message.content });
    } else if (place + 1 >= end || !next?.sides || says(chosen(next))) {
      made.push({ role: message.role, content: message.content });
    }
  });
  return made;
}

// All that was said before `end` as one text.
const prompt = (end) => talk.messages.slice(0, end).map(contentOf).join("");

// Sampling as a request says it: fields that are empty are the server's to choose.
// Throws Failure when a field holds what it may not.
function sampling(form, asText) {
  const made = {};
  for (const input of form.querySelectorAll("input[type=number]")) {
    if (!input.checkValidity()) {
      throw new Failure(`${input.labels[0].textContent.trim()}: ${input.validationMessage}`, { field: input });
    }
    if (input.name && input.value !== "") made[input.name] = Number(input.value);
  }
  const stops = form.elements.stop.value.split("\n").filter((line) => line !== "");
  const signs = { n: "\n", t: "\t", r: "\r", "\\": "\\" };
  if (stops.length) made.stop = stops.map((line) => line.replace(/\\([ntr\\])/g, (_, sign) => signs[sign]));
  if (asText && made.max_tokens === undefined) made.max_tokens = 256;
  const field = form.elements.further;
  if (!field.value.trim()) return made;
  let more = null;
  try {
    more = JSON.parse(field.value);
  } catch (error) {
    throw new Failure(`Further fields: ${error.message}`, { field });
  }
  if (more === null || typeof more !== "object" || Array.isArray(more)) {
    const words = 'Further fields: a JSON object was expected, such as {"logit_bias": {"50": -100}}.';
    throw new Failure(words, { field });
  }
  const mine = ["messages", "prompt", "model", "stream", "stream_options", "seed", "n"];
  const own = mine.find((name) => Object.hasOwn(more, name));
  if (own) throw new Failure(`Further fields: the page itself says ${own}.`, { field });
  return { ...made, ...more };
}

// The seed of the next answer: the one that is set, or a new one.
function seedOf(form) {
  const field = form.elements.seed;
  const seed = field.value.trim();
  if (!seed) return String(crypto.getRandomValues(new Uint32Array(1))[0]);
  if (/^-?\d{1,20}$/.test(seed)) return BigInt(seed).toString();
  throw new Failure("Seed: a whole number was expected.", { field });
}

// The body of a request, as text: a seed may have more digits than JavaScript's numbers.
function bodyOf(answer, end, settings, asText, top) {
  const body = { ...settings, model: answer.model, stream: true, stream_options: { include_usage: true } };
  if (asText) body.prompt = prompt(end);
  else body.messages = context(end);
  if (top >= 0 && asText) body.logprobs = top;
  if (top >= 0 && !asText) Object.assign(body, { logprobs: true, top_logprobs: top });
  return `${JSON.stringify(body).slice(0, -1)},"seed":${answer.seed}}`;
}

// Adds what an object of the stream says to the answer.
function take(answer, said) {
  if (said.usage) answer.usage = said.usage;
  for (const choice of said.choices || []) {
    const delta = choice.delta || { content: choice.text };
    answer.content += delta.content || "";
    answer.reasoning += delta.reasoning_content || "";
    for (const part of delta.tool_calls || []) {
      answer.calls[part.index] ||= { id: "", type: "function", function: { name: "", arguments: "" } };
      const call = answer.calls[part.index];
      call.id += part.id || "";
      call.function.name += part.function?.name || "";
      call.function.arguments += part.function?.arguments || "";
    }
    answer.tokens.push(...tokensOf(choice.logprobs));
    answer.reason = choice.finish_reason || answer.reason;
  }
}

// The file of a conversation, which `mlxgpt chat` loads, too: system prompt, then user and assistant in turns.
function saved(settings) {
  const messages = [];
  for (const { reasoning_content, ...message } of context()) {
    const last = messages.at(-1);
    if (reasoning_content) message.reasoning_content = reasoning_content;
    if (last && last.role === message.role && message.role !== "tool" && !last.tool_calls && !message.tool_calls) {
      last.content += message.content;
    } else {
      messages.push(message);
    }
  }
  const waits = messages.at(-1)?.role === "user" ? messages.pop().content : "";
  return { messages, page: { ...settings, models: talk.models, text: talk.asText, draft: waits } };
}

// The messages of a file.
// Throws Failure when it holds none.
function loaded(text) {
  let row;
  try {
    row = JSON.parse(text);
  } catch (error) {
    throw new Failure(`This file is not JSON: ${error.message}`);
  }
  const messages = Array.isArray(row) ? row : row?.messages;
  const roles = ["system", "developer", "user", "assistant", "tool"];
  if (!Array.isArray(messages)) throw new Failure('This file has no conversation: {"messages": [...]} was expected.');
  const made = { system: "", messages: [], page: row.page && typeof row.page === "object" ? row.page : {} };
  messages.forEach((message, place) => {
    const content = Array.isArray(message?.content)
      ? message.content.map((part) => part?.text ?? "").join("")
      : (message?.content ?? (message?.tool_calls ? "" : undefined));
    if (!roles.includes(message?.role) || typeof content !== "string") {
      throw new Failure(`Message ${place + 1} of this file has no role and content.`);
    }
    if (place === 0 && ["system", "developer"].includes(message.role)) {
      made.system = content;
    } else if (message.role === "assistant") {
      const answer = newAnswer("", content);
      if (typeof message.reasoning_content === "string") answer.reasoning = message.reasoning_content;
      if (Array.isArray(message.tool_calls)) answer.calls = message.tool_calls.map(callOf);
      made.messages.push({ role: "assistant", sides: [answer], chosen: 0 });
    } else {
      made.messages.push({ role: message.role, content, id: message.tool_call_id });
    }
  });
  return made;
}

function callOf(call) {
  const given = call?.function?.arguments ?? "";
  const written = typeof given === "string" ? given : JSON.stringify(given);
  const name = String(call?.function?.name ?? "");
  return { id: String(call?.id ?? ""), type: "function", function: { name, arguments: written } };
}
