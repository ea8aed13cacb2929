// Elements by id, and new elements with their attributes and children. Text always enters as text, never as HTML.

/** The element with an id. */
export const at = (id) => document.getElementById(id);

/**
 * A new element.
 * @param {string} name tag, with classes after dots, as in "p.note"
 * @param {object} attributes "on…" are listeners; true is an attribute without a value; null and false leave it out
 * @param {...(Node|string|null)} children strings become text; null is left out
 */
export function make(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.classList.add(...classes);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Set an element's text if it is another one: assistive technology need not hear the same twice. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show a text in an element that is hidden while it has none. */
export function tell(element, text) {
  say(element, text);
  element.hidden = !text;
}

/** A button that copies a text, and says that it did. */
export function copyButton(label, text) {
  const button = make("button.quiet", { type: "button" }, label);
  button.addEventListener("click", async () => {
    await copy(text);
    say(button, "Copied");
  });
  return button;
}

/** Copy a text, also where the page is not served securely and the clipboard's own interface is closed. */
async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = make("textarea.unseen");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}
