// The state of the moment: rates from the differences of counters, queue and rows, and the memory that holds experts.

import { at, make, say } from "./dom.js";
import { bytes, count, percent, short } from "./format.js";

const KEPT = 120;
const RATE_SECONDS = 4;
const LINE = { width: 120, height: 26 };

export class Now {
  constructor(live) {
    this.history = [];
    this.tiles = {};
    this.bars = {};
    live.addEventListener("now", ({ detail }) => this.#take(detail));
  }

  #take(event) {
    at("no-figures").hidden = Boolean(event.engine);
    if (!event.engine) {
      this.history = [];
      return;
    }
    const last = this.history.at(-1);
    if (last && (event.seconds < last.at || event.engine.steps < last.steps)) this.history = []; // another process
    this.history.push(sample(event));
    if (this.history.length > KEPT) this.history.shift();
    this.#show(event);
  }

  #show({ engine, totals, tiers, expected_nats: nats }) {
    const rates = this.history.map((_, index) => rate(this.history, index));
    const now = rates.at(-1);
    const queue = engine.waiting ? `${count(engine.waiting)} waiting` : "none waiting";
    this.#tile("speed", "tokens/s", short(now.tokens), `${count(engine.generated_tokens)} in all`, rates.map((one) => one.tokens));
    this.#tile("rows", "running", count(engine.running), queue, this.history.map((one) => one.running));
    this.#tile("hits", "found in a slot", now.hits === null ? "–" : percent(now.hits), `${count(totals.misses)} fetched in all`, rates.map((one) => one.hits));
    this.#tile("fetched", "fetched a second", bytes(now.fetched), now.read ? `${bytes(now.read)}/s from disk` : "nothing from disk", rates.map((one) => one.fetched));
    const price = nats === undefined || nats === null ? "" : `, perplexity × ${short(Math.exp(nats))}`;
    this.#tile("deficit", "missing now", now.deficit === null ? "–" : percent(now.deficit), `${percent(totals.deficit)} in all${price}`, rates.map((one) => one.deficit), "missing");
    const everything = tiers.slot_experts + tiers.disk_experts;
    this.#bar("slots", "Slots", tiers.slot_experts, Math.max(totals.available, tiers.slot_experts), `${count(tiers.slot_experts)} of ${count(totals.available)} experts, ${bytes(tiers.slot_bytes)}`);
    if (tiers.host_bytes) this.#bar("host", "Host memory", tiers.host_experts, everything, `${count(tiers.host_experts)} experts, ${bytes(tiers.host_bytes)}`);
    const found = engine.cached_tokens ? `, ${percent(engine.cached_tokens / engine.prompt_tokens)} of prompts found again` : "";
    this.#bar("kv", "KV memory", engine.kv_tokens, engine.kv_capacity_tokens, `${count(engine.kv_tokens)} of ${count(engine.kv_capacity_tokens)} tokens${found}`);
  }

  #tile(id, name, value, note, line, kind = "") {
    this.tiles[id] ??= this.#newTile(name, kind);
    const tile = this.tiles[id];
    say(tile.value, value);
    say(tile.note, note);
    tile.line.setAttribute("points", points(line));
  }

  #newTile(name, kind) {
    const value = make("dd.value");
    const note = make("dd.note");
    const line = svg("polyline", { fill: "none", "stroke-width": "1.5", "vector-effect": "non-scaling-stroke" });
    const chart = svg("svg", { viewBox: `0 0 ${LINE.width} ${LINE.height}`, preserveAspectRatio: "none", "aria-hidden": "true", class: `line ${kind}` });
    chart.append(line);
    at("tiles").append(make("div.tile", {}, make("dt", {}, name), value, make("dd", {}, chart), note));
    return { value, note, line };
  }

  #bar(id, name, value, most, text) {
    if (!this.bars[id]) {
      const meter = make("meter", { min: "0", "aria-label": name });
      const told = make("span");
      this.bars[id] = { meter, told };
      at("memory").append(make("div", {}, make("dt", {}, name), make("dd", {}, meter, told)));
    }
    const { meter, told } = this.bars[id];
    meter.max = Math.max(most, 1);
    meter.value = value;
    say(told, text);
  }
}

function sample({ seconds, engine, totals, tiers }) {
  return {
    at: seconds,
    running: engine.running,
    steps: engine.steps,
    tokens: engine.generated_tokens,
    hits: totals.hits,
    misses: totals.misses,
    fetched: totals.fetch_bytes,
    read: tiers.disk_read_bytes,
    wanted: totals.demand_mass,
    missing: totals.deficit * totals.demand_mass,
  };
}

/** Rates at one sample, over the seconds before it. Shares are null where nothing happened. */
function rate(history, index) {
  const to = history[index];
  let start = index;
  while (start > 0 && to.at - history[start].at < RATE_SECONDS - 0.5) start -= 1;
  const from = history[start];
  const elapsed = Math.max(to.at - from.at, 1e-3);
  const more = (name) => Math.max(0, to[name] - from[name]);
  const lookups = more("hits") + more("misses");
  return {
    tokens: more("tokens") / elapsed,
    hits: lookups ? more("hits") / lookups : null,
    fetched: more("fetched") / elapsed,
    read: more("read") / elapsed,
    deficit: more("wanted") > 1e-6 ? more("missing") / more("wanted") : null,
  };
}

function points(line) {
  const most = Math.max(...line.map((value) => value ?? 0), 1e-9);
  const step = LINE.width / (KEPT - 1);
  const offset = LINE.width - step * (line.length - 1);
  return line
    .map((value, index) => (value === null ? null : `${(offset + index * step).toFixed(1)},${(LINE.height - 1.5 - (LINE.height - 3) * (value / most)).toFixed(1)}`))
    .filter((point) => point !== null)
    .join(" ");
}

function svg(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
