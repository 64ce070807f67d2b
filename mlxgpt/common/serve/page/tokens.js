"use strict";
// Tokens of an answer with their probabilities: over the text when it is pointed at, and one by one.

const LEVELS = [0.5, 0.1, 0.01, 0.001]; // a token that was likelier than the first needs no color

// null: of a token that could not be drawn
const likelihood = (logprob) => (logprob === null ? 0 : Math.exp(logprob));
const percent = (p) => (p >= 0.9995 ? "100 %" : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : `${(100 * p).toExponential(0)} %`);
const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍");
const hex = (bytes) => bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");

// The bytes of a token of /v1/completions, which says those of half characters as bytes:\xe2\x96.
function bytesOf(token) {
  const half = /^bytes:((?:\\x[0-9a-fA-F]{2})+)$/.exec(token);
  if (half) return half[1].slice(2).split("\\x").map((two) => parseInt(two, 16));
  return [...new TextEncoder().encode(token)];
}

// Bytes as text, or as they are where they are no whole characters.
function named(bytes) {
  if (!bytes.length) return "∅";
  try {
    return visible(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes)));
  } catch {
    return hex(bytes);
  }
}

// The tokens of a piece of a stream: {bytes, logprob, top: [[bytes, logprob], ...]}.
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({
      bytes: one.bytes || bytesOf(one.token),
      logprob: one.logprob,
      top: (one.top_logprobs || []).map((other) => [other.bytes || bytesOf(other.token), other.logprob]),
    }));
  }
  return (logprobs.tokens || []).map((token, place) => ({
    bytes: bytesOf(token),
    logprob: logprobs.token_logprobs[place],
    top: Object.entries(logprobs.top_logprobs?.[place] || {}).map(([other, logprob]) => [bytesOf(other), logprob]),
  }));
}

// What each token adds to the text: a character belongs to the token that completes it.
function textsOf(tokens) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return tokens.map((token) => decoder.decode(new Uint8Array(token.bytes), { stream: true }));
}

function level(token) {
  const p = likelihood(token.logprob);
  const place = LEVELS.findIndex((border) => p >= border);
  return place < 0 ? LEVELS.length : place;
}

// An element of a token; `holder` is the answer that it is of.
function tokenOf(holder, place, text) {
  const made = make("span", `token level${level(holder.tokens[place])}`, text);
  made.dataset.place = place;
  return made;
}

// The tokens one by one, exactly as they were drawn.
function drawTokens(element, holder) {
  const texts = textsOf(holder.tokens);
  for (let place = element.childElementCount; place < texts.length; place++) {
    const text = texts[place];
    const made = tokenOf(holder, place, text ? text.replace(/\n/g, "⏎\n") : hex(holder.tokens[place].bytes));
    if (!text) made.classList.add("half");
    made.tabIndex = place ? -1 : 0;
    element.append(made);
  }
}

// Wraps the text inside `element` into its tokens; what markdown took away is passed over.
function wrapTokens(element, holder) {
  const texts = textsOf(holder.tokens);
  const source = texts.join("");
  const owner = []; // of each character of the source, its token
  texts.forEach((text, place) => {
    for (let sign = 0; sign < text.length; sign++) owner.push(place);
  });
  let at = Math.max(0, source.lastIndexOf(holder.content.trim()));
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT, (node) =>
    node.parentElement.closest("button") ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT,
  );
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  for (const node of nodes) {
    const places = [];
    const whole = source.indexOf(node.data, at);
    if (whole >= 0 && whole < at + 2000) {
      at = whole + node.data.length;
      for (let place = whole; place < at; place++) places.push(owner[place]);
    } else {
      for (const sign of node.data) {
        const found = source.indexOf(sign, at);
        const near = found >= 0 && found < at + 40;
        places.push(...Array.from(sign, () => (near ? owner[found] : -1)));
        if (near) at = found + sign.length;
      }
    }
    const made = document.createDocumentFragment();
    for (let from = 0, to; from < places.length; from = to) {
      for (to = from + 1; to < places.length && places[to] === places[from]; ) to++;
      const text = node.data.slice(from, to);
      made.append(places[from] < 0 ? text : tokenOf(holder, places[from], text));
    }
    node.replaceWith(made);
  }
}

// The one tooltip of the page.
const tip = {
  of: null,

  show(span, holder) {
    const box = document.getElementById("tip");
    const token = holder.tokens[span.dataset.place];
    const rows = token.top.map(([bytes, logprob]) => ({ bytes, logprob, drawn: `${bytes}` === `${token.bytes}` }));
    if (!rows.some((row) => row.drawn)) rows.push({ bytes: token.bytes, logprob: token.logprob, drawn: true });
    const list = make("table");
    for (const { bytes, logprob, drawn } of rows) {
      const p = likelihood(logprob);
      const bar = make("i", "bar");
      bar.style.width = `${Math.max(1, 100 * p)}%`;
      const row = make("tr", drawn ? "drawn" : "", make("th", "", named(bytes)), make("td", "", percent(p)));
      row.append(make("td", "bars", bar));
      list.append(row);
    }
    const head = make("p", "", make("b", "", named(token.bytes)), ` ${percent(likelihood(token.logprob))}`);
    head.append(make("small", "", `log-probability ${token.logprob?.toFixed(3) ?? "-∞"}`));
    box.replaceChildren(head, list);
    this.hide();
    this.of = span;
    for (const part of this.parts(span)) part.classList.add("shown");
    span.setAttribute("aria-describedby", "tip");
    box.hidden = false;
    this.place(box, span);
  },

  // A token that markdown cut into several elements is one token.
  parts: (span) => span.closest(".tokens, .text").querySelectorAll(`[data-place="${span.dataset.place}"]`),

  place(box, span) {
    const [word] = span.getClientRects();
    if (!word) return;
    const wide = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(word.left, wide - box.offsetWidth - 8));
    const below = word.bottom + 6;
    const fits = below + box.offsetHeight < window.innerHeight || word.top < box.offsetHeight + 8;
    box.style.left = `${left}px`;
    box.style.top = `${fits ? below : word.top - box.offsetHeight - 6}px`;
  },

  // After the text moved: the tooltip of a token that keys reached moves along.
  moved() {
    if (this.of && this.of === document.activeElement) this.place(document.getElementById("tip"), this.of);
    else this.hide();
  },

  hide() {
    if (!this.of) return false;
    if (this.of.isConnected) for (const part of this.parts(this.of)) part.classList.remove("shown");
    this.of.removeAttribute("aria-describedby");
    this.of = null;
    document.getElementById("tip").hidden = true;
    return true;
  },
};

// Opens the tooltip of a token of `element` when it is pointed at, tapped, or reached by keys.
function watchTokens(element, holder) {
  // a first tap makes the elements of tokens, and so hits what was there before them
  const under = (event) => (event.type === "click" ? document.elementFromPoint(event.clientX, event.clientY) : null);
  const found = (event) => event.target.closest("[data-place]") || under(event)?.closest(".tokens [data-place], .text [data-place]");
  const open = (event) => found(event) && found(event) !== tip.of && tip.show(found(event), holder);
  element.addEventListener("pointerover", open);
  element.addEventListener("click", open);
  element.addEventListener("focusin", open);
  element.addEventListener("focusout", () => tip.hide());
  element.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch" && !element.contains(document.activeElement)) tip.hide();
  });
  element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const here = found(event);
    if (!here) return;
    const ends = { Home: element.firstElementChild, End: element.lastElementChild }[event.key];
    const next = ends || (step > 0 ? here.nextElementSibling : step < 0 ? here.previousElementSibling : null);
    if (step || ends) event.preventDefault();
    if (!next || next === here) return;
    here.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
