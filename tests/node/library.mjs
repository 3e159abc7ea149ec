// Does one thing with one Node library: `node library.mjs LIBRARY BASE KEY MODEL WHAT`; prints what it saw as JSON.
import Anthropic from "@anthropic-ai/sdk";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const [library, base, key, model, what] = process.argv.slice(2);
const prompt = what === "long" ? "word ".repeat(45000) : "Say pong.";
const messages = [{ role: "user", content: prompt }];
const maxRetries = what === "limit" ? 8 : 0;
const parameters = {
  type: "object", properties: { q: { type: "string", enum: ["ping", "pong"] } }, required: ["q"], additionalProperties: false,
};
const forced = what === "forced";

async function pieces(parts) {
  const seen = [];
  for await (const part of parts) if (part) seen.push(part);
  return { text: seen.join(""), pieces: seen.length };
}

async function* contents(stream) {
  for await (const chunk of stream) yield chunk.choices[0]?.delta?.content;
}

const libraries = {
  async openai() {
    const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: key, maxRetries });
    if (what === "stream") return pieces(contents(await client.chat.completions.create({ model, messages, stream: true })));
    if (forced || what === "tool") {
      const tools = [{ type: "function", function: { name: "look_up", parameters } }];
      const final = await client.chat.completions.stream({
        model, messages, tools, tool_choice: forced ? { type: "function", function: { name: "look_up" } } : "auto",
      }).finalChatCompletion();
      const call = final.choices[0].message.tool_calls[0].function;
      return { tool: call.name, arguments: JSON.parse(call.arguments) };
    }
    return { text: (await client.chat.completions.create({ model, messages })).choices[0].message.content };
  },
  async anthropic() {
    const client = new Anthropic({ baseURL: base, apiKey: key, maxRetries });
    const ask = { model, max_tokens: 64, messages };
    if (what === "stream") {
      const seen = [];
      const stream = client.messages.stream(ask).on("text", (text) => seen.push(text));
      await stream.finalMessage();
      return { text: seen.join(""), pieces: seen.length };
    }
    if (forced || what === "tool") {
      const tools = [{ name: "look_up", input_schema: parameters }];
      const tool_choice = forced ? { type: "tool", name: "look_up" } : { type: "auto" };
      const block = (await client.messages.stream({ ...ask, tools, tool_choice }).finalMessage()).content.at(-1);
      return { tool: block.name, arguments: block.input };
    }
    return { text: (await client.messages.create(ask)).content[0].text };
  },
  async ai() {
    const provider = createOpenAICompatible({ name: "strongroom", baseURL: `${base}/v1`, apiKey: key });
    const ask = { model: provider(model), prompt, maxRetries };
    if (what === "stream") return pieces(streamText(ask).textStream);
    if (forced || what === "tool") {
      const tools = { look_up: tool({ inputSchema: jsonSchema(parameters) }) };
      const call = (await streamText({ ...ask, tools, toolChoice: forced ? "required" : "auto" }).toolCalls)[0];
      return { tool: call.toolName, arguments: call.input };
    }
    return { text: (await generateText(ask)).text };
  },
};

try {
  console.log(JSON.stringify(await libraries[library]()));
} catch (error) {
  const kinds = [];
  for (let at = error; at && at.constructor !== Object; at = Object.getPrototypeOf(at)) kinds.push(at.constructor.name);
  const cause = error.lastError ?? error;
  console.log(JSON.stringify({ error: kinds, status: cause.status ?? cause.statusCode ?? null, message: cause.message }));
}
