// Requests to the server, its errors, its streams, and the keys of this tab.

const KEY = "deepfew.key";
const ADMIN = "deepfew.admin";

/** A refusal of the server: its status and its own words. Status 0: it did not answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The keys, kept in the tab until it is closed. */
export const keys = {
  get api() { return sessionStorage.getItem(KEY) ?? ""; },
  set api(key) { sessionStorage.setItem(KEY, key); },
  get admin() { return sessionStorage.getItem(ADMIN) ?? ""; },
  set admin(key) { sessionStorage.setItem(ADMIN, key); },
};

/**
 * Send a request; the response is one with a good status.
 * @throws {ApiError} another status, or no answer
 */
export async function request(path, { body, admin = false, signal } = {}) {
  const headers = {};
  if (keys.api) headers.Authorization = `Bearer ${keys.api}`;
  if (keys.admin && (admin || !keys.api)) headers["X-API-Key"] = keys.admin;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body === undefined ? "GET" : "POST",
      body: body === undefined ? undefined : JSON.stringify(body),
      headers,
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.");
  }
  if (!response.ok) throw new ApiError(response.status, await messageOf(response));
  return response;
}

/** The JSON of a response. */
export const json = async (path, options) => (await request(path, options)).json();

async function messageOf(response) {
  try {
    const { error } = await response.json();
    return typeof error === "string" ? error : error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/**
 * The `data` of a stream's events, as they arrive.
 * @param {number} silenceMs the longest time without a byte; 0 waits for ever
 * @throws {ApiError} the connection broke, or was silent for too long
 */
export async function* events(response, silenceMs = 0) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await inTime(reader.read(), silenceMs);
      if (done) return;
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (data) yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function inTime(read, silenceMs) {
  let timer;
  const silence = new Promise((_, reject) => {
    if (silenceMs) timer = setTimeout(() => reject(new ApiError(0, "The server has been silent for too long.")), silenceMs);
  });
  try {
    return await Promise.race([read, silence]);
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(0, "The connection to the server broke.");
  } finally {
    clearTimeout(timer);
  }
}
