// Calls of the server this page came from, and its streams of events.

const stored = () => JSON.parse(sessionStorage.getItem("octavo") ?? "{}");

export const settings = {
  get: stored,
  set: (values) => sessionStorage.setItem("octavo", JSON.stringify(values)),
};

export function samplingFields() {
  const { temperature, top_p, max_tokens, seed } = stored();
  const given = { temperature, top_p, max_tokens, seed };
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined && value !== null));
}

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

export async function call(path, body, signal) {
  const headers = {};
  const { key } = stored();
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { headers, signal };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const response = await fetch(path, options);
  if (!response.ok) throw new Error(await refusal(response));
  return response;
}

export const ask = async (path, body, signal) => (await call(path, body, signal)).json();

// The data of server-sent events, parsed, until the stream ends.
export async function* events(path, body, signal) {
  const response = await call(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const lines = text.slice(0, end).split("\n");
      text = text.slice(end + 2);
      const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message ?? String(event.error));
      yield event;
    }
  }
}

let known;
export async function model() {
  known ??= (await ask("v1/models")).data[0].id;
  return known;
}
