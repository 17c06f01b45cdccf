// OpenAI's client for Node: node node_client.mjs URL, of a server with the API key "sk-key" and the model "served".

import assert from "node:assert/strict";
import OpenAI, {
  APIConnectionTimeoutError,
  APIUserAbortError,
  AuthenticationError,
  BadRequestError,
  NotFoundError,
} from "openai";

const url = process.argv[2];
const baseURL = `${url}/v1`;
const model = "served";
const client = new OpenAI({ baseURL, apiKey: "sk-key", maxRetries: 0 });
const chats = client.chat.completions;
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const drawn = { model, messages, max_tokens: 20, temperature: 0.8, seed: 7 };

async function errorOf(promise) {
  return promise.then(
    () => assert.fail("it was answered"),
    (error) => error,
  );
}

async function chat() {
  const whole = await chats.create(drawn);
  const text = whole.choices[0].message.content;
  assert(text.length > 0 && whole.usage.completion_tokens > 0);

  const found = { text: "", usage: null, reason: null };
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await chats.create({ ...drawn, ...options })) {
    found.text += chunk.choices[0]?.delta.content ?? "";
    found.reason = chunk.choices[0]?.finish_reason ?? found.reason;
    found.usage = chunk.usage ?? found.usage;
  }
  assert.equal(found.text, text);
  assert.equal(found.reason, whole.choices[0].finish_reason);
  assert.equal(found.usage.total_tokens, whole.usage.total_tokens);

  let heard = "";
  const stream = chats.stream({ ...drawn, logprobs: true, top_logprobs: 2 });
  stream.on("content", (delta) => (heard += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(heard, text);
  assert.equal(final.choices[0].message.content, text);
  assert.equal(final.choices[0].logprobs.content.length, whole.usage.completion_tokens);
}

const CITY = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const weather = { name: "get_weather", description: "Weather in a city.", parameters: CITY, strict: true };
const tools = [{ type: "function", function: weather }];

async function toolCalls() {
  const asked = { ...drawn, max_tokens: 200, tools, tool_choice: "required", parallel_tool_calls: false };
  const whole = (await chats.create(asked)).choices[0];
  assert.equal(whole.finish_reason, "tool_calls");
  const call = whole.message.tool_calls[0];
  assert.equal(call.function.name, "get_weather");
  assert.equal(JSON.parse(call.function.arguments).city, "Paris");
  const streamed = (await chats.stream(asked).finalChatCompletion()).choices[0];
  assert.equal(streamed.finish_reason, "tool_calls");
  assert.deepEqual(streamed.message.tool_calls[0].function.arguments, call.function.arguments);

  const result = { role: "tool", tool_call_id: call.id, content: "sunny" };
  const answer = await chats.create({ ...drawn, tools, messages: [...messages, whole.message, result] });
  assert(answer.choices[0].message.content.length > 0);

  const ran = [];
  const run = (given) => (ran.push(given), "sunny");
  const runnable = [{ type: "function", function: { ...weather, parse: JSON.parse, function: run } }];
  const choice = { type: "function", function: { name: "get_weather" } };
  await chats.runTools({ ...asked, tools: runnable, tool_choice: choice }).finalChatCompletion();
  assert.deepEqual(ran[0], { city: "Paris" });
}

async function structured() {
  const schema = {
    type: "object",
    properties: { name: { enum: ["Ann", "Bob"] }, adult: { type: "boolean" } },
    required: ["name", "adult"],
    additionalProperties: false,
  };
  const format = { type: "json_schema", json_schema: { name: "person", strict: true, schema } };
  const answer = await chats.parse({ ...drawn, max_tokens: 200, response_format: format });
  const found = JSON.parse(answer.choices[0].message.content);
  assert(["Ann", "Bob"].includes(found.name) && typeof found.adult === "boolean");
}

async function otherRoutes() {
  const prompts = ["the fox", "a dog"];
  const completion = await client.completions.create({ model, prompt: prompts, max_tokens: 5, logprobs: 1, echo: true });
  assert.deepEqual(completion.choices.map((one, i) => one.text.startsWith(prompts[i])), [true, true]);

  const packed = await client.embeddings.create({ model, input: prompts }); // the client asks for base64
  const floats = await client.embeddings.create({ model, input: prompts, encoding_format: "float" });
  packed.data[1].embedding.forEach((x, i) => assert(Math.abs(x - floats.data[1].embedding[i]) < 1e-6));

  const models = [];
  for await (const one of client.models.list()) models.push(one.id);
  assert.deepEqual(models, [model]);
  assert.equal((await client.models.retrieve(model)).id, model);
}

async function errors() {
  const bad = await errorOf(chats.create({ ...drawn, temperature: -1 }));
  assert(bad instanceof BadRequestError);
  assert.deepEqual([bad.status, bad.param, bad.type], [400, "temperature", "BadRequestError"]);
  assert(bad.requestID.length > 0);
  assert((await errorOf(chats.create({ ...drawn, stream: true, n: 0 }))) instanceof BadRequestError);
  assert((await errorOf(chats.create({ ...drawn, model: "other" }))) instanceof NotFoundError);
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  assert((await errorOf(stranger.models.list())) instanceof AuthenticationError);
}

async function aborts() {
  const long = { ...drawn, max_tokens: 3000, ignore_eos: true };
  assert((await errorOf(chats.create(long, { timeout: 200 }))) instanceof APIConnectionTimeoutError);

  const controller = new AbortController();
  const waiting = errorOf(chats.create(long, { signal: controller.signal }));
  setTimeout(() => controller.abort(), 100);
  assert((await waiting) instanceof APIUserAbortError);

  let count = 0;
  const stream = await chats.create({ ...long, stream: true });
  for await (const _ of stream) if (++count === 3) stream.controller.abort();
  assert(count < 100);
  for await (const _ of await chats.create({ ...long, stream: true })) break;

  const until = Date.now() + 60_000; // nothing goes on
  for (;;) {
    const answer = await fetch(`${url}/v1/octavo/stats`, { headers: { Authorization: "Bearer sk-key" } });
    if ((await answer.json()).requests === 0) break;
    assert(Date.now() < until, "requests go on");
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

for (const part of [chat, toolCalls, structured, otherRoutes, errors, aborts]) {
  await part();
  console.log(part.name);
}
