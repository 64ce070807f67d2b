"use strict";
// What a model wrote, as HTML that can do nothing: marked reads it, DOMPurify lets a short list of elements through.

function make(tag, name = "", ...inside) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...inside);
  return made;
}

function button(text, act, name = "", hint = "") {
  const made = make("button", name, text);
  made.type = "button";
  if (hint) made.title = hint;
  made.addEventListener("click", act);
  return made;
}

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  KEEP_CONTENT: true,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

const escapeText = (text) =>
  text.replace(/[&<>"']/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[sign]);

const reader = new marked.Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escapeText(text), // tags are shown as they were written
    image: ({ href, text }) => `<a href="${escapeText(href)}">[image: ${escapeText(text || href)}]</a>`, // never loaded
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

// The elements of one block of markdown.
function blockOf(token, links) {
  const tokens = [token];
  tokens.links = links;
  const made = make("div", "block", DOMPurify.sanitize(reader.parser(tokens), ALLOWED));
  for (const pre of made.querySelectorAll("pre")) {
    const code = pre.textContent;
    const holder = make("div", "code");
    pre.replaceWith(holder);
    pre.tabIndex = 0; // so that keys can scroll it
    const copied = button("Copy", () => copy(code, copied), "small", "Copy the code");
    holder.append(pre, copied);
  }
  for (const table of made.querySelectorAll("table")) {
    const holder = make("div", "scrolls");
    table.replaceWith(holder);
    holder.append(table);
  }
  return made;
}

// Markdown that grows in an element: blocks that did not change stay.
class Markdown {
  #blocks = [];

  constructor(element) {
    this.element = element;
  }

  show(text) {
    const tokens = reader.lexer(text);
    const seen = JSON.stringify(tokens.links);
    tokens.forEach((token, place) => {
      const old = this.#blocks[place];
      if (old && old.raw === token.raw && old.type === token.type && old.seen === seen) return;
      const block = { raw: token.raw, type: token.type, seen, element: blockOf(token, tokens.links) };
      if (old) old.element.replaceWith(block.element);
      else this.element.append(block.element);
      this.#blocks[place] = block;
    });
    for (const block of this.#blocks.splice(tokens.length)) block.element.remove();
  }
}

// Text that grows in an element as it is.
class Plain {
  #node = document.createTextNode("");

  constructor(element) {
    element.append(this.#node);
  }

  show(text) {
    if (text.startsWith(this.#node.data)) this.#node.appendData(text.slice(this.#node.length));
    else this.#node.data = text;
  }
}

async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // pages that are not from this machine have no clipboard without https
    const area = make("textarea", "away");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    pressed.focus();
  }
  const before = pressed.textContent;
  if (before === "Copied") return;
  pressed.textContent = "Copied";
  setTimeout(() => (pressed.textContent = before), 1500);
}
