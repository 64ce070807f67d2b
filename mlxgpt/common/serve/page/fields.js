"use strict";
// The fields of the page: models and settings, what is wrong in them, and what of them is kept.

const $ = (id) => document.getElementById(id);
const form = $("form");
const KEPT = "mlxgpt talk";
let served = []; // {id, chat, max_model_len}
let wanted = "chat"; // the mode that was chosen; a model without a template has text alone

const modelOf = (name) => served.find((model) => model.id === name);
const say = (words) => ($("status").textContent = words);

function note(words, act = null) {
  $("notice").hidden = !words;
  $("notice").replaceChildren(words, ...(act ? [" ", act] : []));
}

// Mode, names and hints, after a model or the mode was chosen.
function settle() {
  talk.models = [$("model").value, $("other").value].filter(Boolean);
  const plain = talk.models.filter((name) => modelOf(name)?.chat === false);
  const modes = form.elements.mode;
  modes[0].disabled = plain.length > 0;
  modes.value = plain.length ? "text" : wanted;
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
  document.title = [talk.models.join(" and "), "mlxgpt"].filter(Boolean).join(" · ");
  if (asText !== talk.asText) {
    talk.asText = asText;
    show();
  }
  keep();
}

// The conversation and the settings stay when the page is loaded again, in this tab.
let later = 0;
function keep() {
  clearTimeout(later);
  later = setTimeout(keepNow, 500);
}

function keepNow() {
  const state = { ...talk, wanted, settings: settings(), draft: $("say").value };
  // where all of it is too large: without every token's probabilities
  const slim = (key, value) => (key === "tokens" ? [] : value);
  if (!kept.set(KEPT, JSON.stringify(state))) kept.set(KEPT, JSON.stringify(state, slim));
}
window.addEventListener("pagehide", keepNow);

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

// The settings of the next answers, or null where a field holds what it may not; that is said.
function ready() {
  try {
    if (!talk.models.length) throw new Failure("There is no model yet.");
    const scores = form.elements.scores.checked ? Number($("likely").value || 0) : -1;
    return { given: sampling(form, talk.asText), seed: seedOf(form), scores, asText: talk.asText };
  } catch (error) {
    note(error.message);
    if (error.field) {
      openSettings(true);
      if (error.field.validity.valid) error.field.setCustomValidity(error.message);
      error.field.reportValidity();
    }
    return null;
  }
}

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
  const system = form.elements.system.value;
  form.reset();
  form.elements.system.value = system;
  settle();
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", (event) => {
  event.target.setCustomValidity("");
  if (event.target.name === "mode") wanted = event.target.value;
  talk.system = form.elements.system.value;
  note("");
  settle();
});
for (const id of ["model", "other"]) $(id).addEventListener("change", settle);
