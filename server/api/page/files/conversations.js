// The conversations and the settings of the chat, kept in the browser. The oldest conversations go when there are too many.

const CONVERSATIONS = "deepfew.conversations";
const SETTINGS = "deepfew.settings";
const MAX_CONVERSATIONS = 50;
const MAX_CHARACTERS = 2_000_000;

export class Conversations {
  constructor() {
    const kept = read(CONVERSATIONS);
    this.all = Array.isArray(kept) ? kept.filter((one) => Array.isArray(one?.messages)) : [];
    this.settings = read(SETTINGS) ?? {};
    if (!this.all.length) this.begin();
    this.current = this.all[0];
  }

  /** Begin an empty conversation, or go to the one that is empty still. */
  begin() {
    let empty = this.all.find((one) => !one.messages.length);
    if (!empty) {
      empty = { id: Date.now().toString(36) + Math.random().toString(36).slice(2, 8), messages: [] };
      this.all.unshift(empty);
    }
    this.current = empty;
  }

  /** Go to a conversation. */
  open(id) {
    this.current = this.all.find((one) => one.id === id) ?? this.current;
  }

  /** Delete the current conversation. */
  remove() {
    this.all = this.all.filter((one) => one !== this.current);
    this.begin();
    this.save();
  }

  /** Delete all. */
  clear() {
    this.all = [];
    this.begin();
    this.save();
  }

  /** Keep everything; conversations that do not fit go, the oldest first. */
  save() {
    this.all = [this.current, ...this.all.filter((one) => one !== this.current)].slice(0, MAX_CONVERSATIONS);
    for (;;) {
      const text = JSON.stringify(this.all.filter((one) => one.messages.length));
      if (text.length <= MAX_CHARACTERS && write(CONVERSATIONS, text)) return;
      if (this.all.length === 1) return; // one conversation alone is too long: it lasts as long as the page
      this.all.pop();
    }
  }

  saveSettings() {
    write(SETTINGS, JSON.stringify(this.settings));
  }

  /** The beginning of a conversation's first question. */
  static title(one) {
    const text = one.messages[0]?.content.trim().replace(/\s+/g, " ") ?? "";
    if (!text) return "New conversation";
    return text.length > 60 ? `${text.slice(0, 59)}…` : text;
  }
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // not ours, or storage is closed to this page
  }
}

function write(name, text) {
  try {
    localStorage.setItem(name, text);
    return true;
  } catch {
    return false;
  }
}
