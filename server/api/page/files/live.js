// The live stream: it connects, adds the differences up, connects again after every end, and tells its listeners.

import { ApiError, events, request } from "./api.js";
import { Experts } from "./cells.js";

const PAUSES_MS = [500, 1000, 2000, 4000];
const SILENCE_MS = 15_000; // an event comes every second

/**
 * Events: "now" (figures of the moment), "experts" (this.experts changed), "broken" (an ApiError, or null once it works).
 */
export class Live extends EventTarget {
  constructor() {
    super();
    this.experts = null;
    this.now = null;
  }

  /** Follow the server for as long as the page is open; `unlocked` resolves when there may be another key. */
  async run(unlocked) {
    for (let failures = 0; ; ) {
      await visible();
      const leave = new AbortController();
      const hide = () => document.hidden && leave.abort();
      document.addEventListener("visibilitychange", hide);
      try {
        const response = await request("experts/live", { signal: leave.signal });
        failures = 0;
        this.#tell("broken", null);
        for await (const data of events(response, SILENCE_MS)) this.#take(JSON.parse(data));
        throw new ApiError(0, "The server ended.");
      } catch (error) {
        if (error.name === "AbortError") continue;
        if (!(error instanceof ApiError)) throw error;
        this.#tell("broken", error);
        if (error.status === 401) await unlocked();
        else await pause(PAUSES_MS[Math.min(failures++, PAUSES_MS.length - 1)]);
      } finally {
        document.removeEventListener("visibilitychange", hide);
      }
    }
  }

  #take(event) {
    if (event.error) throw new ApiError(0, event.error);
    if (event.type === "now") this.now = event;
    else if (event.ids) this.experts.change(event);
    else this.experts = Experts.of(event, this.experts);
    this.#tell(event.type, event);
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", function shown() {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", shown);
      resolve();
    });
  });
}
