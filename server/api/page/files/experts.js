// The panel around the map: legend, figures of one expert, the difference of two, and the map as a table.

import { PLACES } from "./cells.js";
import { at, make, say } from "./dom.js";
import { count, percent, short, signed } from "./format.js";
import { ExpertMap, css } from "./map.js";

export class ExpertsPanel {
  constructor(live) {
    this.live = live;
    this.map = new ExpertMap(at("map"), at("canvas"), (id) => {
      this.#read();
      say(at("spoken"), id === null ? "" : spoken(figuresOf(this.live.experts, id), this.map.chosen.includes(id)));
    });
    live.addEventListener("experts", () => this.#show());
    live.addEventListener("now", () => this.#show());
    at("mode").addEventListener("change", () => {
      this.map.mode = at("mode").value;
      this.#show();
    });
    at("order").addEventListener("change", () => {
      this.map.order = at("order").value;
      this.map.arrange();
      this.#show();
    });
    at("table").addEventListener("toggle", () => at("table").open && this.#table());
    at("table-layer").addEventListener("change", () => this.#table());
    at("table-again").addEventListener("click", () => this.#table());
  }

  #show() {
    const { experts, now } = this.live;
    if (!experts) return;
    this.map.show(experts, now?.layer_deficit);
    this.#legend(experts);
    this.#read();
    if (at("table-layer").options.length !== experts.numLayers + 1) this.#layers(experts);
  }

  #legend(experts) {
    const { places, heat, missing, from, to } = this.map.legend;
    const counts = experts.counts();
    const items = this.map.mode === "place"
      ? PLACES.map((name, place) => (counts[place] || place < 4 ? swatch(css(places[place]), name, count(counts[place])) : null))
        .concat(swatch(css(heat), "wanted now"), swatch(css(missing), "and missing"))
      : [gradient(css(from), css(to))];
    at("legend").replaceChildren(...items.filter((item) => item !== null));
  }

  /** Show the figures of the chosen experts and of the one that is pointed at. */
  #read() {
    const { experts } = this.live;
    if (!experts) return;
    const { chosen, pointed } = this.map;
    const shown = [...new Set([...chosen, ...(pointed === null ? [] : [pointed])])].slice(0, 2);
    if (pointed !== null && chosen.length === 2 && !chosen.includes(pointed)) shown.splice(1, 1, pointed);
    if (!shown.length) {
      at("reading").replaceChildren();
      return;
    }
    const [a, b] = shown.map((id) => figuresOf(experts, id));
    const rows = Object.keys(a.values).map((name) => {
      const { format, of } = FIGURES[name];
      const cells = [make("th", { scope: "row" }, of), make("td", {}, format(a.values[name]))];
      if (b) cells.push(make("td", {}, format(b.values[name])), make("td", {}, signed(b.values[name] - a.values[name], format)));
      return make("tr", {}, ...cells);
    });
    const heads = [make("td"), head(a)];
    if (b) heads.push(head(b), make("th", { scope: "col" }, "difference"));
    at("reading").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)));
  }

  #layers(experts) {
    const options = [make("option", { value: "" }, "all layers")];
    for (let layer = 0; layer < experts.numLayers; layer++) options.push(make("option", { value: layer }, `layer ${layer}`));
    at("table-layer").replaceChildren(...options);
  }

  #table() {
    const { experts, now } = this.live;
    if (!experts) return;
    const layer = at("table-layer").value;
    at("table-body").replaceChildren(layer === "" ? layersTable(experts, now) : layerTable(experts, Number(layer)));
  }
}

const FIGURES = {
  demand: { of: "wanted", format: count },
  uses: { of: "served", format: count },
  share: { of: "share of its layer", format: percent },
  missing: { of: "missing of that", format: percent },
  lately: { of: "wanted lately", format: short },
};

function figuresOf(experts, id) {
  const layer = Math.floor(id / experts.numExperts);
  const mass = experts.demandMass[id];
  const deep = experts.deepOf[id];
  return {
    name: `layer ${layer}, expert ${id % experts.numExperts}`,
    place: PLACES[experts.placeOf(id)],
    deep: deep >= 0 ? `deep expert ${deep}` : "",
    values: {
      demand: experts.demand[id],
      uses: experts.uses[id],
      share: mass / Math.max(experts.sum(layer, experts.demandMass), 1e-9),
      missing: experts.missing(id) / Math.max(mass, 1e-9),
      lately: experts.lately[id],
    },
  };
}

function spoken({ name, place, deep, values }, isChosen) {
  const told = Object.keys(values).map((figure) => `${FIGURES[figure].of} ${FIGURES[figure].format(values[figure])}`);
  return [isChosen ? `${name}, chosen` : name, place, deep, ...told].filter(Boolean).join("; ");
}

const head = ({ name, place, deep }) => make("th", { scope: "col" }, name, make("span.place", {}, place), make("span.place", {}, deep));

function swatch(colour, name, value) {
  const box = make("span.swatch");
  box.style.background = colour;
  return make("li", {}, box, value === undefined ? name : `${name} `, value === undefined ? null : make("b", {}, value));
}

function gradient(from, to) {
  const bar = make("span.gradient");
  bar.style.background = `linear-gradient(to right, ${from}, ${to})`;
  return make("li", {}, "less", bar, "more");
}

function table(heads, rows) {
  return make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...rows.map(([first, ...rest]) => make("tr", {}, make("th", { scope: "row" }, first), ...rest.map((text) => make("td", {}, text))))));
}

function layersTable(experts, now) {
  const rows = [];
  for (let layer = 0; layer < experts.numLayers; layer++) {
    const places = PLACES.map((_, place) => count(experts.sum(layer, (id) => (experts.placeOf(id) === place ? 1 : 0))));
    rows.push([`layer ${layer}`, ...places.slice(0, 4), count(experts.sum(layer, experts.demand)), count(experts.sum(layer, experts.uses)),
      percent(now?.layer_deficit?.[layer] ?? 0)]);
  }
  return table(["layer", ...PLACES.slice(0, 4), "wanted", "served", "missing"], rows);
}

function layerTable(experts, layer) {
  const rows = [];
  for (let expert = 0; expert < experts.numExperts; expert++) {
    const id = layer * experts.numExperts + expert;
    const { values } = figuresOf(experts, id);
    rows.push([`expert ${expert}`, PLACES[experts.placeOf(id)], ...Object.keys(values).map((name) => FIGURES[name].format(values[name]))]);
  }
  return table(["expert", "place", ...Object.values(FIGURES).map(({ of }) => of)], rows);
}
