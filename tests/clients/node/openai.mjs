// OpenAI's Node client: chat completions and responses.
import OpenAI from "openai";

const [url, api, how, told, ...questions] = process.argv.slice(2);
const defaultHeaders = JSON.parse(process.env.HEADRACE_HEADERS);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", defaultHeaders, maxRetries: 0 });
const parameters = { type: "object", properties: { at: { type: "string" } }, required: ["at"] };
const [calls, texts, usage] = [[], [], []];

/** The text of a stream's deltas; `take` finds them in its events. */
async function joined(stream, take) {
  let text = "";
  for await (const event of stream) text += take(event) ?? "";
  return text;
}

async function chat() {
  const tools = [{ type: "function", function: { name: "weather", parameters } }];
  const messages = [];
  for (const question of questions) {
    messages.push({ role: "user", content: question });
    for (let goesOn = true; goesOn; ) {
      const asked = { model: "sim", messages, tools };
      let answer;
      if (how === "whole") {
        answer = await client.chat.completions.create(asked);
        texts.push(answer.choices[0].message.content ?? "");
      } else {
        const stream = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
        texts.push(await joined(stream, (chunk) => chunk.choices[0]?.delta.content));
        answer = await stream.finalChatCompletion();
      }
      const { message } = answer.choices[0];
      messages.push(message);
      usage.push([answer.usage.prompt_tokens, answer.usage.completion_tokens]);
      for (const call of message.tool_calls ?? []) {
        calls.push(JSON.parse(call.function.arguments));
        messages.push({ role: "tool", tool_call_id: call.id, content: told });
      }
      goesOn = Boolean(message.tool_calls?.length);
    }
  }
}

async function responses(isById) {
  const tools = [{ type: "function", name: "weather", parameters, strict: true }];
  let [input, previous] = [[], undefined];
  for (const question of questions) {
    input.push({ role: "user", content: question });
    for (let goesOn = true; goesOn; ) {
      const asked = { model: "sim", input, tools, previous_response_id: previous, store: isById };
      let answer;
      if (how === "whole") {
        answer = await client.responses.create(asked);
        texts.push(answer.output_text);
      } else {
        const stream = client.responses.stream(asked);
        texts.push(await joined(stream, (event) => (event.type === "response.output_text.delta" ? event.delta : "")));
        answer = await stream.finalResponse();
      }
      usage.push([answer.usage.input_tokens, answer.usage.output_tokens]);
      if (isById) [input, previous] = [[], answer.id];
      else input.push(...answer.output);
      const wanted = answer.output.filter((item) => item.type === "function_call");
      for (const call of wanted) {
        calls.push(JSON.parse(call.arguments));
        input.push({ type: "function_call_output", call_id: call.call_id, output: told });
      }
      goesOn = wanted.length > 0;
    }
  }
}

await { chat, responses: () => responses(false), "responses by id": () => responses(true) }[api]();
console.log(JSON.stringify({ calls, texts, usage }));
