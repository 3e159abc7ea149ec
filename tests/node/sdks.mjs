// Drives the Node SDKs against a gateway: `node sdks.mjs BASE KEY MODEL EMBEDDER`. Prints one JSON object of what each saw.
import Anthropic from "@anthropic-ai/sdk";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const [base, key, model, embedder] = process.argv.slice(2);
const seen = {};
const messages = [{ role: "user", content: "hi" }];

const openai = new OpenAI({ baseURL: `${base}/v1`, apiKey: key, maxRetries: 0 });
const plain = await openai.chat.completions.create({ model, messages });
let text = "";
let usage = null;
for await (const chunk of await openai.chat.completions.create({
  model, messages, stream: true, stream_options: { include_usage: true },
})) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
seen.openai_stream_equals_plain = text === plain.choices[0].message.content && text.length > 0;
seen.openai_usage = usage.completion_tokens === plain.usage.completion_tokens;
seen.openai_embedding = (await openai.embeddings.create({ model: embedder, input: "hi" })).data[0].embedding.length > 0;
seen.openai_responses = (await openai.responses.create({ model, input: "hi" })).output_text === text;
seen.openai_errors = {};
for (const [name, call] of Object.entries({
  key: () => new OpenAI({ baseURL: `${base}/v1`, apiKey: "sr_wrong", maxRetries: 0 }).models.list(),
  model: () => openai.chat.completions.create({ model: "nope", messages }),
  long: () => openai.chat.completions.create({ model, messages: [{ role: "user", content: "word ".repeat(9000) }] }),
})) {
  try {
    await call();
  } catch (error) {
    seen.openai_errors[name] = [error.constructor.name, error.status, error.code, typeof error.error?.message];
  }
}

const anthropic = new Anthropic({ baseURL: base, apiKey: key, maxRetries: 0 });
const message = await anthropic.messages.create({ model, max_tokens: 32, messages });
const final = await anthropic.messages.stream({ model, max_tokens: 32, messages }).finalMessage();
seen.anthropic_stream_equals_plain = final.content[0].text === message.content[0].text && message.content[0].text === text;
try {
  await anthropic.messages.create({ model: "nope", max_tokens: 8, messages });
} catch (error) {
  seen.anthropic_error = [error.constructor.name, error.status, error.error?.error?.type];
}

const provider = createOpenAICompatible({ name: "strongroom", baseURL: `${base}/v1`, apiKey: key, includeUsage: true });
seen.ai_generate = (await generateText({ model: provider(model), prompt: "hi" })).text === text;
const stream = streamText({ model: provider(model), prompt: "hi" });
let streamed = "";
for await (const part of stream.textStream) streamed += part;
seen.ai_stream = streamed === text;
seen.ai_usage = (await stream.usage).outputTokens === plain.usage.completion_tokens;

console.log(JSON.stringify(seen));
