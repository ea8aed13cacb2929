// A small part of Markdown as elements: paragraphs, headings, lists, quotes, code, emphasis, and links to http(s).
// Every piece of the text enters as text, so an answer cannot bring markup of its own.

import { copyButton, make } from "./dom.js";

const FENCE = /^\s*(```+|~~~+)\s*([\w+-]*)/;
const ITEM = /^\s*(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|\*(\S(?:.*?\S)?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/;

/** The elements of a text. */
export function markdown(text) {
  const lines = text.split("\n");
  const blocks = [];
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) blocks.push(make("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let at = 0; at < lines.length; at++) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (fence) {
      flush();
      const code = [];
      while (++at < lines.length && !lines[at].trimStart().startsWith(fence[1])) code.push(lines[at]);
      blocks.push(codeBlock(code.join("\n"), fence[2]));
    } else if (heading) {
      flush();
      blocks.push(make(`h${Math.min(6, heading[1].length + 3)}`, {}, ...inline(heading[2])));
    } else if (ITEM.test(line)) {
      flush();
      const items = [];
      const first = ITEM.exec(line)[1];
      for (let item; at < lines.length && (item = ITEM.exec(lines[at])); at++) items.push(make("li", {}, ...inline(item[2])));
      at -= 1;
      blocks.push(first === undefined ? make("ul", {}, ...items) : make("ol", { start: first }, ...items));
    } else if (line.startsWith(">")) {
      flush();
      const quoted = [];
      for (; at < lines.length && lines[at].startsWith(">"); at++) quoted.push(lines[at].replace(/^>\s?/, ""));
      at -= 1;
      blocks.push(make("blockquote", {}, ...inline(quoted.join("\n"))));
    } else if (line.trim()) {
      paragraph.push(line);
    } else {
      flush();
    }
  }
  flush();
  return blocks;
}

function codeBlock(code, language) {
  return make("div.code", {}, make("div.row", {}, make("span.note", {}, language || "code"), copyButton("Copy code", code)),
    make("pre", { tabindex: "0" }, make("code", {}, code)));
}

function inline(text) {
  const parts = [];
  for (;;) {
    const found = INLINE.exec(text);
    if (!found) break;
    const [all, , code, strong, emphasis, label, link] = found;
    if (found.index) parts.push(text.slice(0, found.index));
    if (code !== undefined) parts.push(make("code", {}, code));
    else if (strong !== undefined) parts.push(make("strong", {}, ...inline(strong)));
    else if (emphasis !== undefined) parts.push(make("em", {}, ...inline(emphasis)));
    else parts.push(make("a", { href: link, target: "_blank", rel: "noopener noreferrer" }, label));
    text = text.slice(found.index + all.length);
  }
  if (text) parts.push(text);
  return parts;
}
