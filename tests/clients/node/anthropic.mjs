// Anthropic's Node client: messages.
import Anthropic from "@anthropic-ai/sdk";

const [url, , how, told, ...questions] = process.argv.slice(2);
const defaultHeaders = JSON.parse(process.env.HEADRACE_HEADERS);
const client = new Anthropic({ baseURL: url, apiKey: "any", defaultHeaders, maxRetries: 0 });
const input_schema = { type: "object", properties: { at: { type: "string" } }, required: ["at"] };
const [calls, texts, usage] = [[], [], []];
const messages = [];

for (const question of questions) {
  messages.push({ role: "user", content: question });
  for (let goesOn = true; goesOn; ) {
    const asked = { model: "sim", max_tokens: 2000, messages, tools: [{ name: "weather", input_schema }] };
    let answer;
    if (how === "whole") {
      answer = await client.messages.create(asked);
      texts.push(answer.content.map((block) => block.text ?? "").join(""));
    } else {
      let text = "";
      answer = await client.messages.stream(asked).on("text", (delta) => (text += delta)).finalMessage();
      texts.push(text);
    }
    messages.push({ role: "assistant", content: answer.content });
    usage.push([answer.usage.input_tokens + answer.usage.cache_read_input_tokens, answer.usage.output_tokens]);
    const wanted = answer.content.filter((block) => block.type === "tool_use");
    calls.push(...wanted.map((call) => call.input));
    const results = wanted.map(({ id }) => ({ type: "tool_result", tool_use_id: id, content: told }));
    if (results.length) messages.push({ role: "user", content: results });
    goesOn = results.length > 0;
  }
}
console.log(JSON.stringify({ calls, texts, usage }));
