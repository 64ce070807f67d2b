"use strict";
// The page: draws the conversation, asks for answers, and does what buttons and keys say.

let running = null; // the AbortController of the answers that grow
let views = new Map(); // answer -> its view
let undone = null; // what the conversation was before it was cleared or cut

// Remembers the conversation as it is, to bring it back.
function remember(words) {
  const before = JSON.stringify([talk.messages, talk.system, talk.asText]);
  undone = () => {
    [talk.messages, talk.system, talk.asText] = JSON.parse(before);
    form.elements.system.value = talk.system;
    wanted = talk.asText ? "text" : "chat";
    note("");
    settle();
    show();
    $("say").focus();
  };
  note(words, button("Undo", () => undone(), "link"));
}

// drawing

const drawn = new WeakMap(); // message -> {element, views, as}

// The element of a message; one that did not change stays as it is.
function drawnOf(message, place) {
  const last = place === talk.messages.length - 1;
  const asks = last && message.sides && chosen(message).calls.length && chosen(message).state !== "going";
  const as = [talk.asText, Boolean(asks), message.chosen];
  const old = drawn.get(message);
  const stays = old?.as.every((value, at) => value === as[at]) &&
    old.views.every((view, side) => view.answer === message.sides[side]);
  if (!stays) drawn.set(message, { ...drawMessage(message, asks), as });
  return drawn.get(message);
}

function show(toEnd = true) {
  tip.hide();
  const made = talk.messages.map(drawnOf);
  views = new Map(made.flatMap((one) => one.views.map((view) => [view.answer, view])));
  for (const view of views.values()) if (view.answer.state === "going") view.draw();
  const list = $("talk");
  made.forEach(({ element }, place) => {
    if (list.children[place] !== element) list.insertBefore(element, list.children[place] || null);
  });
  while (list.children.length > made.length) list.lastChild.remove();
  $("empty").hidden = talk.messages.length > 0;
  document.body.classList.toggle("writes", talk.asText);
  acts.grown(toEnd);
  used();
  keep();
}

// Follows the text while its end is in sight.
let follows = true;
$("scroll").addEventListener("scroll", () => {
  const box = $("scroll");
  follows = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  tip.moved();
});
acts.grown = (always = false) => {
  if (always || follows) $("scroll").scrollTop = $("scroll").scrollHeight;
};

// How much of the context the conversation has.
function used() {
  const last = talk.messages.findLast((message) => message.sides);
  const answer = last && chosen(last);
  const room = modelOf(answer?.model)?.max_model_len;
  const all = answer?.usage?.total_tokens; // the last one drawn needs no room
  const total = all && room ? Math.min(all, room) : all;
  const many = (count) => count.toLocaleString("en");
  $("used").textContent = total ? `${many(total)}${room ? ` of ${many(room)}` : ""} tokens` : "";
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
async function draw(message, answers, how) {
  const end = talk.messages.indexOf(message);
  running = new AbortController();
  busy(true);
  say(answers.length > 1 ? "Both models answer." : "The model answers.");
  for (const answer of answers) answer.state = "going";
  show();
  await Promise.all(answers.map((answer) => drawOne(answer, end, how, running.signal)));
  running = null;
  busy(false);
  const textOf = (answer) => views.get(answer)?.element.querySelector(".text").textContent;
  say(answers.map((answer) => (answer.error ? `Error: ${answer.error}` : textOf(answer))).join(". "));
  if (answers.some((answer) => answer.calls.length)) show();
  used();
  keep();
}

async function drawOne(answer, end, { given, asText, scores }, signal) {
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
function answer(how) {
  const sides = talk.models.map((model) => ({ ...newAnswer(model), seed: how.seed }));
  const message = { role: "assistant", sides, chosen: 0 };
  talk.messages.push(message);
  draw(message, sides, how);
}

// Cuts off the messages from `place` on; from `later` on they are not asked for, and can be had back.
function cut(place, later) {
  if (talk.messages.length > later) remember("Later messages were cut off.");
  else note("");
  talk.messages.splice(place);
}

acts.regenerate = (message) => {
  const how = !running && ready();
  if (!how) return;
  const place = talk.messages.indexOf(message);
  cut(place, place + 1);
  answer(how);
};

acts.retry = (message, old) => {
  const how = !running && ready();
  if (!how) return;
  const place = talk.messages.indexOf(message);
  cut(place + 1, place + 1);
  const fresh = { ...newAnswer(old.model), seed: old.seed };
  message.sides[message.sides.indexOf(old)] = fresh;
  draw(message, [fresh], how);
};

acts.choose = (message, answer) => {
  const side = message.sides.indexOf(answer);
  if (running || message.chosen === side) return;
  const place = talk.messages.indexOf(message);
  cut(place + 1, place + 1);
  message.chosen = side;
  show(false);
  views.get(answer).element.querySelector("[aria-pressed=true]").focus();
};

acts.edit = (message, { element }) => {
  if (running || element.classList.contains("edited")) return;
  const isAnswer = Boolean(message.sides);
  const old = isAnswer ? [...views.values()].find((view) => view.element === element).answer : message;
  editor(element, old.content, isAnswer ? "Save" : "Send", (text) => {
    const how = isAnswer || ready();
    if (!how) return;
    const place = talk.messages.indexOf(message);
    cut(place, place + (isAnswer ? 1 : 2));
    if (isAnswer) {
      const made = { ...newAnswer(old.model, text), reasoning: old.reasoning, calls: old.calls, state: "done" };
      talk.messages.push({ role: "assistant", sides: [made], chosen: 0 });
      show();
    } else {
      talk.messages.push({ ...message, content: text });
      answer(how);
    }
    $("say").focus();
  });
};

acts.results = (results) => {
  const how = !running && ready();
  if (!how) return;
  talk.messages.push(...results);
  answer(how);
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
  const how = ready();
  if (!how) return;
  note("");
  if (text) talk.messages.push({ role: "user", content: text });
  $("say").value = "";
  answer(how);
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
  if (event.key !== "Escape" || event.isComposing || $("ask").open) return;
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
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify(row)}\n`], { type: "application/json" }));
  link.download = `talk-${new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});

$("load").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (!file) return;
  running?.abort();
  try {
    const made = loaded(await file.text());
    if (talk.messages.length) remember("Another conversation was loaded.");
    else note("");
    talk.messages = made.messages;
    form.elements.system.value = talk.system = made.system;
    setSettings(made.page);
    const names = Array.isArray(made.page.models) ? made.page.models.filter(modelOf) : [];
    if (names.length) [$("model").value, $("other").value] = [names[0], names[1] || ""];
    wanted = made.page.text === true ? "text" : "chat";
    if (typeof made.page.draft === "string") $("say").value = made.page.draft;
    settle();
    show();
    size();
  } catch (error) {
    note(error.message);
  }
});

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
      if (used) kept.set(KEY, key);
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
    const { settings: given, draft, wanted: mode, ...state } = JSON.parse(kept.get(KEPT));
    setSettings(given);
    Object.assign(talk, state);
    $("say").value = draft;
    form.elements.system.value = talk.system;
    wanted = mode;
    for (const { sides = [] } of talk.messages) for (const side of sides) if (side.state === "going") side.state = "stopped";
  } catch {
    // nothing was kept
  }
}

restore();
show();
size();
models();
$("say").focus();
