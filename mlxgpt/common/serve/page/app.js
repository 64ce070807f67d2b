"use strict";
// The page: fields, requests, and what buttons and keys do.

const $ = (id) => document.getElementById(id);
const form = $("form");
const KEPT = "mlxgpt talk";
let served = []; // {id, chat, max_model_len}
let running = null; // the AbortController of the answers that grow
let views = new Map(); // answer -> its view
let undone = null; // what the conversation was before it was cleared or cut

const modelOf = (name) => served.find((model) => model.id === name);
const say = (words) => ($("status").textContent = words);

function note(words, act = null) {
  $("notice").hidden = !words;
  $("notice").replaceChildren(words, ...(act ? [" ", act] : []));
}

// Remembers the conversation as it is, to bring it back.
function remember(words) {
  const before = JSON.stringify([talk.messages, talk.system, talk.asText]);
  undone = () => {
    [talk.messages, talk.system, talk.asText] = JSON.parse(before);
    form.elements.system.value = talk.system;
    form.elements.mode.value = talk.asText ? "text" : "chat";
    note("");
    show();
    $("say").focus();
  };
  note(words, button("Undo", () => undone(), "link"));
}

// drawing

function show() {
  tip.hide();
  views = new Map();
  const drawn = talk.messages.map((message, place) => drawMessage(message, place === talk.messages.length - 1));
  for (const { views: made } of drawn) for (const view of made) views.set(view.answer, view);
  $("talk").replaceChildren(...drawn.map(({ element }) => element));
  $("empty").hidden = talk.messages.length > 0;
  document.body.classList.toggle("text", talk.asText);
  acts.grown(true);
  used();
  keep();
}

// Follows the text while its end is in sight.
let follows = true;
$("scroll").addEventListener("scroll", () => {
  const box = $("scroll");
  follows = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  tip.hide();
});
acts.grown = (always = false) => {
  if (always || follows) $("scroll").scrollTop = $("scroll").scrollHeight;
};

// How much of the context the conversation has.
function used() {
  const last = talk.messages.findLast((message) => message.sides);
  const answer = last && chosen(last);
  const room = modelOf(answer?.model)?.max_model_len;
  const total = answer?.usage?.total_tokens;
  const many = (count) => count.toLocaleString("en");
  $("used").textContent = total ? `${many(total)}${room ? ` of ${many(room)}` : ""} tokens` : "";
}

// Mode, names and hints, after a model or the mode was chosen.
function settle() {
  talk.models = [$("model").value, $("other").value].filter(Boolean);
  const plain = talk.models.filter((name) => modelOf(name)?.chat === false);
  const modes = form.elements.mode;
  modes[0].disabled = plain.length > 0;
  if (plain.length) modes.value = "text";
  const asText = modes.value === "text";
  $("modehelp").textContent = plain.length
    ? `${plain.join(" and ")} ${plain.length > 1 ? "have" : "has"} no chat template: what you write is continued.`
    : asText ? "What you write is continued as it is, without a chat template." : "";
  $("systemlabel").hidden = asText;
  $("say").placeholder = asText ? "Text to continue" : "Message";
  $("send").textContent = asText ? "Continue" : "Send";
  form.elements.max_tokens.placeholder = asText ? "256" : "what fits";
  $("empty").firstElementChild.textContent = talk.models.length > 1 ? "Two answers to everything you write" : talk.models[0] || "";
  const rooms = talk.models.map((name) => modelOf(name)?.max_model_len).filter(Boolean);
  $("empty").lastElementChild.textContent = [
    talk.models.length > 1 ? `${talk.models.join(" and ")} get the same messages and the same seed.` : "",
    asText ? "Write the beginning of a text, and the model goes on." : "",
    rooms.length ? `Room for ${Math.min(...rooms).toLocaleString("en")} tokens.` : "",
  ].join(" ");
  if (asText !== talk.asText) {
    talk.asText = asText;
    show();
  }
  keep();
}

// The conversation and the settings stay when the page is loaded again, in this tab.
function keep() {
  const state = { ...talk, settings: settings(), models: talk.models };
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(state));
  } catch {
    // too large with every token's probabilities: without them
    const slim = (key, value) => (key === "tokens" ? [] : value);
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(state, slim));
    } catch {
      sessionStorage.removeItem(KEPT);
    }
  }
}

const settings = () => {
  const made = {};
  for (const field of form.elements) {
    if (field.name && field.type !== "radio" && field.name !== "system") {
      made[field.name] = field.type === "checkbox" ? field.checked : field.value;
    }
  }
  return made;
};

function setSettings(given) {
  for (const field of form.elements) {
    if (!field.name || !Object.hasOwn(given, field.name) || field.type === "radio") continue;
    if (field.type === "checkbox") field.checked = Boolean(given[field.name]);
    else field.value = String(given[field.name]);
  }
}

// answers

function busy(on) {
  document.body.classList.toggle("busy", on);
  const focused = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = on;
  $("stop").hidden = !on;
  if (focused) (on ? $("stop") : $("send")).focus();
}

// Draws answers of one message, all at once; what comes before it is the same for all.
async function draw(message, answers) {
  const end = talk.messages.indexOf(message);
  const asText = talk.asText;
  const scores = form.elements.scores.checked ? Number($("likely").value || 0) : -1;
  let given;
  try {
    given = sampling(form, asText);
  } catch (error) {
    openSettings(true);
    note(error.message);
    throw error;
  }
  running = new AbortController();
  busy(true);
  say(answers.length > 1 ? "Both models answer." : "The model answers.");
  for (const answer of answers) answer.state = "going";
  show();
  await Promise.all(answers.map((answer) => drawOne(answer, end, given, asText, scores, running.signal)));
  running = null;
  busy(false);
  const heard = answers.map((answer) => (answer.error ? `Error: ${answer.error}` : views.get(answer)?.element.querySelector(".text").textContent));
  say(heard.join(". "));
  if (answers.some((answer) => answer.calls.length)) show();
  used();
  keep();
}

async function drawOne(answer, end, given, asText, scores, signal) {
  const began = performance.now();
  const path = asText ? "v1/completions" : "v1/chat/completions";
  const since = () => (performance.now() - began) / 1000;
  try {
    const body = bodyOf(answer, end, given, asText, scores);
    for (;;) {
      try {
        for await (const said of stream(path, body, signal)) {
          take(answer, said);
          if (!answer.first && (answer.content || answer.reasoning || answer.tokens.length)) answer.first = since();
          views.get(answer)?.soon();
        }
        break;
      } catch (error) {
        if (error.status !== 401 || !(await askKey(error.message))) throw error;
      }
    }
    answer.state = "done";
  } catch (error) {
    answer.state = error.name === "AbortError" ? "stopped" : "failed";
    if (answer.state === "failed") answer.error = words(error);
  }
  answer.calls = answer.calls.filter(Boolean);
  answer.seconds = since();
  views.get(answer)?.draw();
  acts.grown();
}

function words(error) {
  const [said] = [error.message.trim()].map((text) => (/[.!?]$/.test(text) ? text : `${text}.`));
  const sentence = said.charAt(0).toUpperCase() + said.slice(1);
  return error.after && !sentence.includes("again in") ? `${sentence} Try again in ${error.after} s.` : sentence;
}

// An answer, or two, to the messages so far.
function answer() {
  try {
    const seed = seedOf(form);
    const sides = talk.models.map((model) => ({ ...newAnswer(model), seed }));
    if (!sides.length) throw new Failure("There is no model yet.");
    sampling(form, talk.asText); // says what is wrong before anything is added
    const message = { role: "assistant", sides, chosen: 0 };
    talk.messages.push(message);
    draw(message, sides).catch(() => {});
    return true;
  } catch (error) {
    openSettings(true);
    note(error.message);
    return false;
  }
}

function cut(message, words, keepIt = false) {
  const place = talk.messages.indexOf(message);
  if (talk.messages.length - place > 2) remember(words);
  else note("");
  talk.messages.splice(place + (keepIt ? 1 : 0));
}

acts.regenerate = (message) => {
  if (running) return;
  cut(message, "Later messages were cut off.");
  answer();
};

acts.retry = (message, old) => {
  if (running) return;
  const fresh = { ...newAnswer(old.model), seed: old.seed };
  message.sides[message.sides.indexOf(old)] = fresh;
  talk.messages.splice(talk.messages.indexOf(message) + 1);
  draw(message, [fresh]).catch(() => {});
};

acts.choose = (message, answer) => {
  if (running) return;
  message.chosen = message.sides.indexOf(answer);
  show();
};

acts.edit = (message, { element }) => {
  if (running || element.classList.contains("edited")) return;
  const isAnswer = Boolean(message.sides);
  const old = isAnswer ? [...views.values()].find((view) => view.element === element).answer : message;
  editor(element, old.content, isAnswer ? "Save" : "Send", (text) => {
    const place = talk.messages.indexOf(message);
    if (talk.messages.length > place + (isAnswer ? 1 : 2)) remember("Later messages were cut off.");
    talk.messages.splice(place);
    if (isAnswer) {
      const made = { ...newAnswer(old.model, text), reasoning: old.reasoning, calls: old.calls, state: "done" };
      talk.messages.push({ role: "assistant", sides: [made], chosen: 0 });
      show();
    } else {
      talk.messages.push({ ...message, content: text });
      if (!answer()) show();
    }
    $("say").focus();
  });
};

acts.results = (results) => {
  if (running) return;
  talk.messages.push(...results);
  answer();
};

acts.pin = (seed) => {
  form.elements.seed.value = seed;
  say(`Every answer has seed ${seed} now.`);
  note(`Every answer has seed ${seed} now.`, button("Draw new ones again", () => {
    form.elements.seed.value = "";
    note("");
    keep();
  }, "link"));
  keep();
};

// fields and buttons

function size() {
  const field = $("say");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, window.innerHeight * 0.4)}px`;
}

function send() {
  if (running) return;
  const text = $("say").value;
  const goesOn = talk.asText && talk.messages.length > 0;
  if (!(talk.asText ? text : text.trim()) && !goesOn) return;
  note("");
  if (text) talk.messages.push({ role: "user", content: text });
  if (!answer()) {
    if (text) talk.messages.pop();
    return;
  }
  $("say").value = "";
  size();
}

$("say").addEventListener("input", size);
$("say").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("ask").open) return;
  if (tip.hide()) return;
  if (running) running.abort();
  else if (!$("settings").hidden && $("settings").contains(document.activeElement)) openSettings(false);
});
document.addEventListener("pointerdown", (event) => {
  if (!event.target.closest("[data-place]")) tip.hide();
});

$("new").addEventListener("click", () => {
  running?.abort();
  if (talk.messages.length) remember("The conversation was cleared.");
  talk.messages = [];
  show();
  $("say").focus();
});

$("save").addEventListener("click", () => {
  const row = saved(settings());
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify(row, null, 1)}\n`], { type: "application/json" }));
  link.download = `talk-${new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});

$("load").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (!file || running) return;
  try {
    const made = loaded(await file.text());
    if (talk.messages.length) remember("Another conversation was loaded.");
    else note("");
    talk.messages = made.messages;
    form.elements.system.value = talk.system = made.system;
    setSettings(made.page);
    const names = Array.isArray(made.page.models) ? made.page.models.filter(modelOf) : [];
    if (names.length) [$("model").value, $("other").value] = [names[0], names[1] || ""];
    form.elements.mode.value = made.page.text === true ? "text" : "chat";
    if (typeof made.page.draft === "string") $("say").value = made.page.draft;
    settle();
    show();
    size();
  } catch (error) {
    note(error.message);
  }
});

const narrow = window.matchMedia("(max-width: 760px)");

function openSettings(on) {
  $("settings").hidden = !on;
  $("adjust").setAttribute("aria-expanded", String(on));
  $("top").inert = $("column").inert = on && narrow.matches; // there they lie below
}
narrow.addEventListener("change", () => openSettings(!$("settings").hidden));
$("adjust").addEventListener("click", () => {
  openSettings($("settings").hidden);
  if (!$("settings").hidden) $("close").focus();
});
$("close").addEventListener("click", () => {
  openSettings(false);
  $("adjust").focus();
});
$("reset").addEventListener("click", () => {
  const { system, mode } = Object.fromEntries(new FormData(form));
  form.reset();
  form.elements.system.value = system;
  if (mode) form.elements.mode.value = mode;
  settle();
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", () => {
  talk.system = form.elements.system.value;
  note("");
  settle();
});
for (const id of ["model", "other"]) $(id).addEventListener("change", settle);

// Asks for a key; whether one was given. Two answers that are refused ask once.
let asked = null;
function askKey(why) {
  asked ||= new Promise((done) => {
    $("askwords").textContent = why;
    $("key").value = "";
    $("ask").returnValue = "";
    $("ask").addEventListener("close", () => {
      const key = $("key").value.trim();
      const used = $("ask").returnValue === "use" && key !== "";
      if (used) keys.set(key);
      $("key").value = "";
      asked = null;
      done(used);
    }, { once: true });
    $("ask").showModal();
  });
  return asked;
}

async function models() {
  try {
    served = (await (await ask("v1/models")).json()).data;
  } catch (error) {
    if (error.status === 401 && (await askKey(error.message))) return models();
    note(`The models are not known: ${error.message}`, button("Try again", models, "link"));
    return;
  }
  note("");
  const options = () => served.map(({ id }) => new Option(id, id));
  $("model").replaceChildren(...options());
  $("other").replaceChildren(new Option("nothing", ""), ...options());
  const [first, second] = talk.models.filter(modelOf);
  if (first) $("model").value = first;
  $("other").value = second || "";
  settle();
}

function restore() {
  try {
    const { settings: given, ...state } = JSON.parse(sessionStorage.getItem(KEPT));
    setSettings(given);
    Object.assign(talk, state);
    form.elements.system.value = talk.system;
    form.elements.mode.value = talk.asText ? "text" : "chat";
    for (const { sides = [] } of talk.messages) for (const side of sides) if (side.state === "going") side.state = "stopped";
  } catch {
    // nothing was kept
  }
}

restore();
show();
models();
$("say").focus();
