// The chat: conversations, messages, and answers that stream in over the OpenAI routes.

import { ApiError, events, request } from "./api.js";
import { Conversations } from "./conversations.js";
import { at, copyButton, make, say } from "./dom.js";
import { count, percent, seconds, short } from "./format.js";
import { markdown } from "./markdown.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

export class Chat {
  /**
   * @param {function(): void} locked called where the server wants a key
   * @param {function(): object|null} served what /info said, once it did
   */
  constructor(locked, served) {
    this.locked = locked;
    this.served = served;
    this.kept = new Conversations();
    this.running = null;
    this.#listen();
    this.#showSettings();
    this.#showConversations();
  }

  /** Offer the profiles and the largest pool of the server. */
  offer({ profiles, max_pool: maxPool }) {
    const choices = [["all", "all that are here"]];
    if (maxPool) choices.push(["pool", "a pool of n"]);
    for (const { name, available_share: share } of profiles) choices.push([`profile:${name}`, `${name} (${percent(share)})`]);
    at("experts-choice").replaceChildren(...choices.map(([value, text]) => make("option", { value }, text)));
    at("pool").max = maxPool;
    at("pool").placeholder = String(Math.ceil(maxPool / 4));
    const { experts } = this.kept.settings;
    at("experts-choice").value = choices.some(([value]) => value === experts) ? experts : "all";
    this.#readSettings();
  }

  #listen() {
    at("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    at("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    at("stop").addEventListener("click", () => this.running?.abort());
    at("new").addEventListener("click", () => this.#go(() => this.kept.begin()));
    at("delete").addEventListener("click", () => this.#go(() => this.kept.remove()));
    at("delete-all").addEventListener("click", () => {
      if (confirm("Delete all conversations?")) this.#go(() => this.kept.clear());
    });
    at("conversation").addEventListener("change", () => this.#go(() => this.kept.open(at("conversation").value)));
    for (const id of ["system", "pool", "on-missing", "experts-choice", ...NUMBERS]) {
      at(id).addEventListener("change", () => this.#readSettings());
    }
  }

  #showSettings() {
    const { settings } = this.kept;
    for (const id of ["system", "pool", ...NUMBERS]) at(id).value = settings[id] ?? "";
    at("on-missing").value = settings["on-missing"] ?? "mask";
  }

  #readSettings() {
    const { settings } = this.kept;
    for (const id of ["system", "pool", ...NUMBERS]) settings[id] = at(id).value;
    settings["on-missing"] = at("on-missing").value;
    settings.experts = at("experts-choice").value || settings.experts;
    at("pool-field").hidden = settings.experts !== "pool";
    this.kept.saveSettings();
  }

  #go(change) {
    this.running?.abort();
    change();
    this.#showConversations();
    at("prompt").focus();
  }

  #showConversations() {
    const { all, current } = this.kept;
    at("conversation").replaceChildren(...all.map((one) => make("option", { value: one.id }, Conversations.title(one))));
    at("conversation").value = current.id;
    this.#showMessages();
  }

  #showMessages() {
    const { messages } = this.kept.current;
    at("messages").replaceChildren(...(messages.length ? messages.map((_, place) => this.#element(place)) : [welcome()]));
    at("messages").scrollTop = at("messages").scrollHeight;
  }

  #element(place) {
    const message = this.kept.current.messages[place];
    const mine = message.role === "user";
    const article = make(mine ? "article.mine" : "article.theirs", {}, make("h3.unseen", {}, mine ? "You" : "Answer"));
    if (mine) article.append(make("p.text", {}, message.content));
    else article.append(...answer(message));
    const buttons = [copyButton("Copy", message.content)];
    if (mine) buttons.push(button("Edit", () => this.#edit(article, place)));
    else buttons.push(button("Ask again", () => this.#ask(place)));
    article.append(make("div.row.tools", {}, ...buttons));
    return article;
  }

  #edit(article, place) {
    const field = make("textarea", { rows: "3", "aria-label": "Message" });
    field.value = this.kept.current.messages[place].content;
    const again = () => {
      if (!field.value.trim()) return;
      this.kept.current.messages[place].content = field.value;
      this.#ask(place + 1);
    };
    field.addEventListener("keydown", (event) => event.key === "Escape" && this.#showMessages());
    article.replaceChildren(field, make("div.row.tools", {}, button("Ask again", again), button("Cancel", () => this.#showMessages())));
    field.focus();
  }

  #send() {
    const text = at("prompt").value;
    if (!text.trim() || this.running) return;
    at("prompt").value = "";
    const { messages } = this.kept.current;
    messages.push({ role: "user", content: text });
    this.#ask(messages.length);
  }

  /** Ask for the message at `place`; those from there on are forgotten. */
  async #ask(place) {
    this.running?.abort();
    const conversation = this.kept.current;
    conversation.messages.length = place;
    const message = { role: "assistant", content: "", thinking: "" };
    const run = (this.running = new AbortController());
    this.#busy(true);
    conversation.messages.push(message);
    this.kept.save();
    this.#showConversations();
    if (document.activeElement === document.body) at("messages").focus({ preventScroll: true }); // its button is gone
    const show = this.#shower(message);
    try {
      await this.#stream(conversation.messages.slice(0, place), message, run.signal, show);
    } catch (error) {
      if (error.name === "AbortError") message.stopped = true;
      else if (error instanceof ApiError) message.error = error.message;
      else throw error;
      if (error.status === 401) this.locked();
    } finally {
      this.kept.save();
      if (this.running === run) {
        this.running = null;
        this.#busy(false);
        if (this.kept.current === conversation) this.#showMessages();
        say(at("said"), message.error ?? (message.stopped ? "Stopped." : `Answer: ${message.content}`));
      }
    }
  }

  #busy(is) {
    at("stop").hidden = !is;
    at("send").hidden = is;
  }

  /** Shows the message that grows, once a frame, and keeps the end in view if it was. */
  #shower(message) {
    let due = false;
    const article = at("messages").lastElementChild;
    return () => {
      if (due) return;
      due = true;
      requestAnimationFrame(() => {
        due = false;
        if (!article.isConnected) return;
        const box = at("messages");
        const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
        article.replaceChildren(make("h3.unseen", {}, "Answer"), ...answer(message, true));
        if (isAtEnd) box.scrollTop = box.scrollHeight;
      });
    };
  }

  async #stream(messages, message, signal, show) {
    const isChat = this.served()?.has_chat_template !== false;
    const began = performance.now();
    let first = null;
    let usage = null;
    const response = await request(isChat ? "v1/chat/completions" : "v1/completions", { body: this.#body(messages, isChat), signal });
    try {
      for await (const data of events(response)) {
        if (data === "[DONE]") break;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(500, event.error.message);
        usage = event.usage ?? usage;
        for (const choice of event.choices) {
          const content = isChat ? choice.delta.content : choice.text;
          const thinking = choice.delta?.reasoning_content;
          if (content || thinking) first ??= performance.now();
          message.content += content ?? "";
          message.thinking += thinking ?? "";
          message.reason = choice.finish_reason ?? message.reason;
          message.deficit = choice.deficit ?? message.deficit;
        }
        show();
      }
    } finally {
      if (usage || first) message.figures = figures(usage, began, first);
    }
  }

  #body(messages, isChat) {
    const { settings } = this.kept;
    const body = { stream: true, stream_options: { include_usage: true }, on_missing: settings["on-missing"] ?? "mask" };
    const said = messages.filter((one) => one.content).map(({ role, content }) => ({ role, content }));
    if (isChat) body.messages = settings.system ? [{ role: "system", content: settings.system }, ...said] : said;
    else body.prompt = said.map((one) => one.content).join("");
    for (const name of NUMBERS) if (settings[name]) body[name] = Number(settings[name]);
    if (!isChat) body.max_tokens ??= 200;
    const [kind, profile] = (settings.experts ?? "all").split(/:(.*)/s);
    if (kind === "profile") body.profile = profile;
    if (kind === "pool") body.pool = Number(settings.pool || at("pool").placeholder);
    return body;
  }
}

const button = (text, onclick) => make("button.quiet", { type: "button", onclick }, text);

function welcome() {
  return make("p.welcome", {}, "Ask something, and see on the map which experts the answer wants, which of them are near, and which are missing.");
}

function answer(message, isRunning = false) {
  const parts = [];
  if (message.thinking) {
    parts.push(make("details.thinking", { open: isRunning && !message.content }, make("summary", {}, "Thinking"),
      make("div.text", {}, message.thinking)));
  }
  parts.push(make("div.text", {}, ...markdown(message.content)));
  if (isRunning && !message.content && !message.thinking) parts.push(make("p.note.waiting", {}, "Reading the prompt…"));
  if (!isRunning && !message.content && !message.error && !message.stopped) parts.push(make("p.note", {}, "The answer is empty."));
  if (message.error) parts.push(make("p.trouble", {}, message.error));
  if (message.stopped) parts.push(make("p.note", {}, "Stopped."));
  if (message.reason === "length") parts.push(make("p.note", {}, "Ended by the limit of tokens."));
  const told = footer(message);
  if (told.length) parts.push(make("dl.figures", {}, ...told));
  return parts;
}

function figures(usage, began, first) {
  const ended = performance.now();
  const tokens = usage?.completion_tokens ?? null;
  return {
    tokens,
    prompt: usage?.prompt_tokens ?? null,
    cached: usage?.prompt_tokens_details?.cached_tokens ?? null,
    ttft: first === null ? null : (first - began) / 1000,
    rate: tokens > 1 && first !== null && ended > first ? (1000 * (tokens - 1)) / (ended - first) : null,
  };
}

function footer({ figures: told, deficit }) {
  const pairs = [];
  if (told?.rate) pairs.push(["tokens/s", short(told.rate)]);
  if (told?.ttft != null) pairs.push(["first token", seconds(told.ttft)]);
  if (told?.tokens != null) pairs.push(["tokens", count(told.tokens)]);
  if (told?.prompt != null) pairs.push(["prompt", count(told.prompt)]);
  if (told?.cached != null) pairs.push(["cached", count(told.cached)]);
  if (deficit) pairs.push(["deficit", percent(deficit.overall)]);
  const loss = deficit?.expected_loss;
  if (loss) pairs.push(["expected perplexity", `× ${short(loss.perplexity_ratio)}${loss.is_measured ? "" : " or more"}`]);
  return pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
}
