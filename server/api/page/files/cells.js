// Every expert of every layer in typed arrays, as the server told it, and the figures that the page makes of it.

const AVAILABLE = 1;
const RESIDENT = 2;
const IN_HOST = 4;
const CORRUPT = 8;
const LATELY_SECONDS = 30;

/** Places by nearness to the compute; an index into this list is a cell's place in the page. */
export const PLACES = ["in a slot", "in host memory", "on disk alone", "not here", "damaged"];

export class Experts {
  /** All cells of an event; `before` keeps what was wanted lately where the model is the same. */
  static of(event, before) {
    const experts = new Experts();
    experts.numLayers = event.num_layers;
    experts.numExperts = event.num_experts;
    Object.assign(experts, columns(event));
    const size = experts.place.length;
    const same = before !== null && before.numLayers === event.num_layers && before.place.length === size;
    experts.heat = same ? before.heat : new Float32Array(size);
    experts.lately = same ? before.lately : new Float32Array(size);
    experts.latelyAt = performance.now();
    if (same) for (let id = 0; id < size; id++) experts.#noteUse(id, before.demand[id]);
    experts.#readDeep(new Uint16Array(buffer(event.deep_experts)));
    return experts;
  }

  /** Take the cells that changed. */
  change(event) {
    const ids = new Uint32Array(buffer(event.ids));
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) this.heat.fill(0); // no fading: a cell glows until the next event
    const told = columns(event);
    const now = performance.now();
    const fade = Math.exp((this.latelyAt - now) / 1000 / LATELY_SECONDS);
    for (let id = 0; id < this.lately.length; id++) this.lately[id] *= fade;
    this.latelyAt = now;
    ids.forEach((id, at) => {
      const before = this.demand[id];
      for (const name of Object.keys(told)) this[name][id] = told[name][at];
      this.#noteUse(id, before);
    });
  }

  /** An index into PLACES. */
  placeOf(id) {
    const place = this.place[id];
    if (place & CORRUPT) return 4;
    if (place & RESIDENT) return 0;
    if (place & IN_HOST) return 1;
    return place & AVAILABLE ? 2 : 3;
  }

  isAvailable(id) { return (this.place[id] & AVAILABLE) !== 0; }

  /** Router mass that asked for an expert and did not get it. */
  missing(id) { return Math.max(0, this.demandMass[id] - this.servedMass[id]); }

  /** Experts in each of PLACES. */
  counts() {
    const found = PLACES.map(() => 0);
    for (let id = 0; id < this.place.length; id++) found[this.placeOf(id)] += 1;
    return found;
  }

  /** Sum of a column, or of a function of a cell's id, over one layer. */
  sum(layer, of) {
    const start = layer * this.numExperts;
    let total = 0;
    for (let id = start; id < start + this.numExperts; id++) total += typeof of === "function" ? of(id) : of[id];
    return total;
  }

  #noteUse(id, before) {
    const more = this.demand[id] - before;
    if (more > 0) {
      this.heat[id] = 1;
      this.lately[id] += more;
    }
  }

  /** `deepOf`: for each cell the place of its deep expert in the store, −1 for those of none. */
  #readDeep(table) {
    this.deepOf = new Int32Array(this.place.length).fill(-1);
    table.forEach((expert, at) => {
      this.deepOf[(at % this.numLayers) * this.numExperts + expert] = Math.floor(at / this.numLayers);
    });
  }
}

const buffer = (text) => Uint8Array.from(atob(text ?? ""), (char) => char.charCodeAt(0)).buffer;

const columns = (event) => ({
  place: new Uint8Array(buffer(event.place)),
  demand: new Uint32Array(buffer(event.demand)),
  uses: new Uint32Array(buffer(event.uses)),
  demandMass: new Float32Array(buffer(event.demand_mass)),
  servedMass: new Float32Array(buffer(event.served_mass)),
});
