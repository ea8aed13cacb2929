// The page's start: the parts are made, the live stream is followed, and the keys are asked for where they are wanted.

import { ApiError, json, keys, request } from "./api.js";
import { Chat } from "./chat.js";
import { at, say, tell } from "./dom.js";
import { ExpertsPanel } from "./experts.js";
import { Growth } from "./growth.js";
import { Live } from "./live.js";
import { Now } from "./now.js";

const VIEWS = ["chat", "experts", "now"];
const KEY = /^[\x21-\x7e]*$/;

let info = null;
let asking = null;

const live = new Live();
const chat = new Chat(() => askForKeys(lockedText()), () => info);
new ExpertsPanel(live);
new Growth(live, askForKeys);
new Now(live);

live.addEventListener("broken", ({ detail }) => {
  if (detail === null) {
    tell(at("trouble"), "");
    return;
  }
  info = null;
  showState("away", detail.status === 401 ? "locked" : "no connection");
  tell(at("trouble"), detail.status === 401 ? "" : `${detail.message} Trying again…`);
});

live.addEventListener("now", ({ detail: { health } }) => {
  showState(health.state, health.state);
  at("loading").hidden = health.state !== "loading";
  at("load-share").value = health.progress;
  say(at("load-phase"), `The model is loading: ${health.phase || "starting"} (${Math.round(100 * health.progress)} %)`);
  tell(at("trouble"), health.state === "failed" ? health.reason : "");
  if (health.state === "ready" && info === null) describe();
});

live.run(() => {
  askForKeys(lockedText());
  return new Promise((resolve) => addEventListener("unlocked", resolve, { once: true }));
});
at("keys").addEventListener("click", () => askForKeys(""));
at("key-cancel").addEventListener("click", () => at("key-dialog").close());
at("key-dialog").addEventListener("close", () => {
  asking?.resolve();
  asking = null;
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKeys();
});
addEventListener("hashchange", showView);
showView();

function lockedText() {
  return keys.api ? "This key is wrong. The server wants another one." : "The server wants its key.";
}

/** Ask for the keys; resolves when the dialog closes. */
function askForKeys(why) {
  if (asking === null) {
    asking = deferred();
    at("api-key").value = keys.api;
    at("admin-key").value = keys.admin;
    at("key-dialog").showModal();
  }
  if (why) say(at("key-why"), why);
  return asking.promise;
}

/** A promise, and the function that resolves it. */
function deferred() {
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  return made;
}

async function useKeys() {
  const [api, admin] = [at("api-key").value.trim(), at("admin-key").value.trim()];
  if (!KEY.test(api) || !KEY.test(admin)) {
    say(at("key-why"), "A key is of printable ASCII characters, without spaces.");
    return;
  }
  Object.assign(keys, { api, admin });
  try {
    await request("health/ready");
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) {
      say(at("key-why"), "This key is wrong. The server wants another one.");
      return;
    }
  }
  say(at("key-why"), "");
  at("key-dialog").close();
  dispatchEvent(new Event("unlocked"));
}

async function describe() {
  info = {};
  try {
    const [found, profiles] = await Promise.all([json("info"), json("experts/profiles")]);
    info = found;
    say(at("model"), `${info.model_id} · ${info.num_layers} layers × ${info.num_experts} experts, ${info.top_k} a token · ${info.model_dtype} on ${info.model_device_type}`);
    document.title = `${info.model_id} · deepfew`;
    chat.offer(profiles);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    info = null; // the next event of the stream tries again
  }
}

function showState(kind, text) {
  at("state").dataset.kind = kind;
  say(at("state"), text);
}

function showView() {
  const view = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat";
  document.body.dataset.view = view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}
