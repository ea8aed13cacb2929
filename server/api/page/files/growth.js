// Growing and shrinking the store: what n deep experts would bring, the change under way, and the deficit as it falls.

import { ApiError, json, keys } from "./api.js";
import { at, make, say, tell } from "./dom.js";
import { bytes, count, percent } from "./format.js";

const PLAN_COUNT = 256;
const PLAN_MS = 10_000;

export class Growth {
  /** @param {function(string): Promise<void>} unlock asks for the admin key and says why */
  constructor(live, unlock) {
    this.live = live;
    this.unlock = unlock;
    this.candidates = [];
    this.plannedAt = -Infinity;
    this.version = null;
    this.isIdle = false;
    this.#build();
    live.addEventListener("now", ({ detail }) => this.#show(detail));
  }

  #build() {
    this.count = make("input", { type: "range", min: "1", max: "1", value: "1", id: "grow-count", oninput: () => this.#bring() });
    this.number = make("output", { for: "grow-count" }, "1");
    this.brings = make("p.brings");
    this.store = make("p.note");
    this.change = make("p.note", { role: "status" });
    this.progress = make("progress", { max: "1", value: "0", "aria-label": "Progress of the change", hidden: true });
    this.trouble = make("p.trouble", { role: "alert", hidden: true });
    this.grow = make("button.main", { type: "button", onclick: () => this.#ask("grow") }, "Grow");
    this.shrink = make("button", { type: "button", onclick: () => this.#ask("shrink") }, "Shrink");
    at("growth").replaceChildren(this.store,
      make("div.row", {}, make("label", { for: "grow-count" }, "Deep experts"), this.count, this.number),
      make("div.row", {}, this.grow, this.shrink),
      this.brings, this.progress, this.change, this.trouble);
  }

  #show({ growth }) {
    const can = growth !== undefined && growth !== null;
    this.isIdle = can && growth.state === "idle";
    for (const element of [this.count, this.shrink]) element.disabled = !this.isIdle;
    this.#bring();
    if (!can) {
      say(this.store, this.live.now.engine ? "What is served here cannot change: it has no store on disk." : "");
      return;
    }
    const limit = growth.budget_bytes === null ? "" : ` of ${bytes(growth.budget_bytes)} that it may take`;
    say(this.store, `The store has ${count(growth.deep_experts)} deep experts, ${bytes(growth.held_bytes)}${limit}.`);
    this.progress.hidden = growth.state === "idle";
    this.progress.value = growth.progress;
    say(this.change, growth.state === "idle" ? "" : `${STATES[growth.state]} ${growth.state === "growing" ? percent(growth.progress) : ""}`);
    if (growth.error) tell(this.trouble, `The last growth failed: ${growth.error}; the log says more.`);
    const version = `${growth.deep_experts} ${growth.state === "idle"}`;
    if (version !== this.version || performance.now() - this.plannedAt > PLAN_MS) this.#plan(version);
  }

  async #plan(version) {
    this.version = version;
    this.plannedAt = performance.now();
    try {
      const plan = await json(`experts/plan?count=${PLAN_COUNT}`);
      this.candidates = plan.candidates;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.candidates = [];
    }
    const most = Math.max(this.candidates.length, Math.min(this.live.now.growth?.deep_experts ?? 1, PLAN_COUNT));
    this.count.max = most;
    if (Number(this.count.value) > most) this.count.value = most;
    this.#bring();
  }

  get #chosen() {
    return this.candidates.slice(0, Number(this.count.value));
  }

  #bring() {
    const n = Number(this.count.value);
    const some = this.#chosen;
    say(this.number, String(n));
    say(this.grow, `Grow by ${some.length}`);
    this.grow.disabled = !this.isIdle || !some.length;
    say(this.shrink, `Shrink by ${n}`);
    const share = some.reduce((sum, one) => sum + one.missing_share, 0);
    const size = some.reduce((sum, one) => sum + one.bytes, 0);
    say(this.brings, some.length
      ? `The best ${some.length === 1 ? "one" : count(some.length)} of ${count(this.candidates.length)} would serve ${percent(share)} of the router mass, which is missing now, and take ${bytes(size)}.`
      : "Nothing that is wanted is missing from the store.");
  }

  async #ask(what) {
    tell(this.trouble, "");
    if (!keys.admin) await this.unlock("Growing and shrinking need the admin key.");
    if (!keys.admin) return;
    try {
      await json(`experts/${what}`, { body: { count: what === "grow" ? this.#chosen.length : Number(this.count.value) }, admin: true });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      tell(this.trouble, error.message);
      if (error.status === 401 || error.status === 403) keys.admin = "";
    }
    this.version = null;
  }
}

const STATES = {
  growing: "Extracting from the checkpoint:",
  adopting: "The model takes the new experts.",
  shrinking: "Giving deep experts up.",
  reloading: "Taking what changed on disk.",
};
