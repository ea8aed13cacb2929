// The map of experts on a canvas: a row for each layer, a cell for each expert, a bar for what each layer misses.
// One pixel of a small image is one cell; the canvas shows it enlarged. So 23,424 cells cost as little as 512.

const LEFT = 30;
const RIGHT = 100;
const RIGHT_NARROW = 62;
const NARROW = 600;
const TOP = 16;
const LEAST_CELL = 1.6;
const GAP_FROM = 5;
const HEAT_HALF_MS = 700;
const COLD = 0.02;
const GLOW = 0.36; // share of a cell's height that glows, so that its own colour stays readable

export class ExpertMap {
  /**
   * @param {HTMLElement} box holds the canvas, scrolls, and takes pointer and keys
   * @param {HTMLCanvasElement} canvas
   * @param {function(number|null, boolean): void} onPoint the cell that is pointed at, and whether it was chosen
   */
  constructor(box, canvas, onPoint) {
    this.box = box;
    this.canvas = canvas;
    this.onPoint = onPoint;
    this.image = document.createElement("canvas");
    this.glow = document.createElement("canvas");
    this.experts = null;
    this.mode = "place";
    this.order = "deep";
    this.deficit = [];
    this.chosen = [];
    this.pointed = null;
    this.paintedAt = 0;
    this.isDue = false;
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.#listen();
    this.#readColours();
  }

  /** Show these experts; `deficit` is the missing share of each layer. */
  show(experts, deficit) {
    const isNew = this.experts?.place !== experts.place;
    this.experts = experts;
    this.deficit = deficit ?? this.deficit;
    if (isNew || !this.columns) this.arrange();
    this.paint();
  }

  /** Put the experts of every layer in order anew. */
  arrange() {
    if (!this.experts) return;
    const { numLayers, numExperts, deepOf, demandMass } = this.experts;
    this.columns = new Uint32Array(numLayers * numExperts); // layer and column → cell
    this.columnOf = new Uint32Array(numLayers * numExperts);
    for (let layer = 0; layer < numLayers; layer++) {
      const start = layer * numExperts;
      const ids = Array.from({ length: numExperts }, (_, expert) => start + expert);
      const place = (id) => (deepOf[id] < 0 ? Infinity : deepOf[id]);
      if (this.order === "deep") ids.sort((a, b) => (place(a) === place(b) ? a - b : place(a) - place(b)));
      if (this.order === "wanted") ids.sort((a, b) => demandMass[b] - demandMass[a] || a - b);
      ids.forEach((id, column) => {
        this.columns[start + column] = id;
        this.columnOf[id] = column;
      });
    }
    this.#measure();
  }

  /** Paint before the next frame. */
  paint() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame((now) => {
      this.isDue = false;
      if (this.experts) this.#paint(now);
    });
  }

  /** Colours of the legend: of each place, of what glows, and of both ends of the scale of a mode. */
  get legend() {
    const { colours } = this;
    const end = this.mode === "missing" ? colours.missing : colours.scale;
    return { places: colours.places, heat: colours.heat, missing: colours.missing, from: colours.low, to: end };
  }

  #readColours() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => rgb(style.getPropertyValue(`--${name}`));
    this.colours = {
      places: ["slot", "host", "disk", "absent", "damaged"].map(of),
      heat: of("heat"), missing: of("missing"), scale: of("scale"), low: of("low"), ink: of("ink-soft"), paper: of("paper"), mark: of("ink"),
    };
  }

  #listen() {
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.#readColours();
      this.paint();
    });
    new ResizeObserver(() => {
      this.#measure();
      this.paint();
    }).observe(this.box);
    this.canvas.addEventListener("pointermove", (event) => this.#point(this.#cellAt(event), false));
    this.canvas.addEventListener("pointerleave", () => this.#point(null, false));
    this.canvas.addEventListener("click", (event) => this.#point(this.#cellAt(event), true));
    this.box.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    if (!this.experts) return;
    const { numLayers, numExperts } = this.experts;
    const id = this.pointed ?? this.columns[0];
    let layer = Math.floor(id / numExperts);
    let column = this.columnOf[id];
    const moves = {
      ArrowLeft: () => (column -= 1), ArrowRight: () => (column += 1), ArrowUp: () => (layer -= 1), ArrowDown: () => (layer += 1),
      Home: () => (column = 0), End: () => (column = numExperts - 1), PageUp: () => (layer = 0), PageDown: () => (layer = numLayers - 1),
    };
    if (event.key === "Escape") {
      this.chosen = [];
      this.#point(null, false);
    } else if (event.key === "Enter" || event.key === " ") {
      this.#point(id, true);
    } else if (moves[event.key]) {
      if (this.pointed !== null) moves[event.key]();
      layer = Math.min(Math.max(layer, 0), numLayers - 1);
      column = Math.min(Math.max(column, 0), numExperts - 1);
      this.#point(this.columns[layer * numExperts + column], false);
      this.#reveal(column);
    } else {
      return;
    }
    event.preventDefault();
  }

  #reveal(column) {
    const x = LEFT + column * this.cell;
    if (x < this.box.scrollLeft + LEFT) this.box.scrollLeft = x - LEFT;
    if (x + this.cell > this.box.scrollLeft + this.box.clientWidth) this.box.scrollLeft = x + this.cell - this.box.clientWidth;
  }

  #point(id, isChoice) {
    if (id === null && isChoice) return;
    if (isChoice) {
      const at = this.chosen.indexOf(id);
      if (at >= 0) this.chosen.splice(at, 1);
      else this.chosen = [...this.chosen, id].slice(-2);
    } else if (id === this.pointed) {
      return;
    }
    this.pointed = id;
    this.onPoint(id, isChoice);
    this.paint();
  }

  #cellAt(event) {
    if (!this.experts) return null;
    const { numLayers, numExperts } = this.experts;
    const column = Math.floor((event.offsetX - LEFT) / this.cell);
    const layer = Math.floor((event.offsetY - TOP) / this.row);
    if (column < 0 || column >= numExperts || layer < 0 || layer >= numLayers) return null;
    return this.columns[layer * numExperts + column];
  }

  #measure() {
    if (!this.experts) return;
    const { numLayers, numExperts } = this.experts;
    this.right = this.box.clientWidth < NARROW ? RIGHT_NARROW : RIGHT;
    const room = Math.max(this.box.clientWidth - LEFT - this.right, 100);
    this.cell = Math.max(room / numExperts, LEAST_CELL);
    this.row = Math.min(Math.max(this.cell, 340 / numLayers, 5), 24);
    const width = LEFT + this.cell * numExperts + this.right;
    const height = TOP + this.row * numLayers + 2;
    const scale = devicePixelRatio || 1;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    for (const image of [this.image, this.glow]) Object.assign(image, { width: numExperts, height: numLayers });
  }

  #paint(now) {
    const isHot = this.#paintCells(now);
    const { numLayers, numExperts } = this.experts;
    const context = this.canvas.getContext("2d");
    const scale = devicePixelRatio || 1;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.imageSmoothingEnabled = false;
    const width = this.cell * numExperts;
    const height = this.row * numLayers;
    context.drawImage(this.image, LEFT, TOP, width, height);
    for (let layer = 0; isHot && layer < numLayers; layer++) {
      context.drawImage(this.glow, 0, layer, numExperts, 1, LEFT, TOP + (layer + 1 - GLOW) * this.row, width, GLOW * this.row);
    }
    context.fillStyle = css(this.colours.paper);
    if (this.cell >= GAP_FROM) for (let at = 0; at <= numExperts; at++) context.fillRect(LEFT + at * this.cell - 0.5, TOP, 1, height);
    if (this.row >= GAP_FROM) for (let at = 0; at <= numLayers; at++) context.fillRect(LEFT, TOP + at * this.row - 0.5, width, 1);
    this.#paintMargins(context, width);
    context.strokeStyle = css(this.colours.mark);
    for (const id of new Set([...this.chosen, ...(this.pointed === null ? [] : [this.pointed])])) {
      context.lineWidth = this.chosen.includes(id) ? 2.5 : 1.5;
      const x = LEFT + this.columnOf[id] * this.cell;
      const y = TOP + Math.floor(id / numExperts) * this.row;
      context.strokeRect(x - 1, y - 1, this.cell + 2, this.row + 2);
    }
    if (isHot && !this.still.matches) this.paint();
  }

  /** Names of the layers on the left; on the right a bar for the share that a layer misses. */
  #paintMargins(context, width) {
    const { numLayers } = this.experts;
    const step = Math.ceil(13 / this.row);
    const most = Math.max(0.05, ...this.deficit);
    const room = this.right - 12;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (let layer = 0; layer < numLayers; layer++) {
      const y = TOP + layer * this.row;
      context.fillStyle = css(this.colours.ink);
      if (layer % step === 0) context.fillText(String(layer), LEFT - 7, y + this.row / 2);
      context.fillStyle = css(this.colours.low);
      context.fillRect(LEFT + width + 8, y + 0.5, room, Math.max(this.row - 1, 1));
      context.fillStyle = css(this.colours.missing);
      context.fillRect(LEFT + width + 8, y + 0.5, (room * (this.deficit[layer] ?? 0)) / most, Math.max(this.row - 1, 1));
    }
    context.fillStyle = css(this.colours.ink);
    context.textAlign = "left";
    context.fillText("layer", 0, 7);
    context.fillText(`${this.right === RIGHT ? "missing " : ""}≤ ${Math.round(100 * most)} %`, LEFT + width + 8, 7);
  }

  /** Colour every cell and its glow; returns whether one glows. */
  #paintCells(now) {
    const { experts, colours } = this;
    const { numLayers, numExperts, heat } = experts;
    const fade = this.still.matches ? 1 : 0.5 ** (Math.min(now - this.paintedAt, 100) / HEAT_HALF_MS);
    this.paintedAt = now;
    const value = this.mode === "place" ? null : values(experts, this.mode);
    const most = value ? Math.max(value.reduce((a, b) => Math.max(a, b), 0), 1e-9) : 1;
    const end = this.mode === "missing" ? colours.missing : colours.scale;
    const pixels = new ImageData(numExperts, numLayers);
    const glow = new ImageData(numExperts, numLayers);
    let isHot = false;
    for (let at = 0; at < this.columns.length; at++) {
      const id = this.columns[at];
      pixels.data.set(value ? mix(colours.low, end, Math.sqrt(value[id] / most)) : colours.places[experts.placeOf(id)], 4 * at);
      pixels.data[4 * at + 3] = 255;
      if (heat[id] > COLD) {
        glow.data.set(experts.isAvailable(id) ? colours.heat : colours.missing, 4 * at);
        glow.data[4 * at + 3] = 255 * heat[id];
        heat[id] *= fade;
        isHot = true;
      }
    }
    this.image.getContext("2d").putImageData(pixels, 0, 0);
    this.glow.getContext("2d").putImageData(glow, 0, 0);
    return isHot && !value;
  }
}

function values(experts, mode) {
  if (mode === "demand") return experts.demand;
  if (mode === "uses") return experts.uses;
  if (mode === "lately") return experts.lately;
  return Float32Array.from(experts.place, (_, id) => experts.missing(id));
}

function rgb(text) {
  const value = parseInt(text.trim().slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/** An RGB list as CSS has it. */
export const css = (colour) => `rgb(${colour.map(Math.round).join(" ")})`;

const mix = (from, to, share) => [0, 1, 2].map((at) => from[at] + (to[at] - from[at]) * Math.min(share, 1));
