// llama.cpp's side of peers.py, through node-llama-cpp (npm ships it compiled; nothing is built here).
//
// stdin: {"package": folder of node-llama-cpp, "gguf", "threads", "document": ids, "suffixes": [ids],
//         "state": file, "restart": bool, "tokens": n}
// stdout, last line: {"cold_s", "warm_s": [...], "reply": [ids]}, or after a restart {"restart_s", "reply"}
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const task = JSON.parse(readFileSync(0, "utf8"));
const {getLlama} = await import(pathToFileURL(`${task.package}/dist/index.js`).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: task.threads});
const model = await llama.loadModel({modelPath: task.gguf});
const size = task.document.length + 64 + task.tokens;
const context = await model.createContext({contextSize: size, batchSize: 512, threads: task.threads});
const sequence = context.getSequence();

async function generate(ids, n) {
    const reply = [];
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        reply.push(token);
        if (reply.length === n) break;
    }
    return reply;
}

async function timed(work) {
    const began = performance.now();
    const result = await work();
    return [(performance.now() - began) / 1e3, result];
}

async function cutBack() {
    const end = sequence.nextTokenIndex;
    if (end > task.document.length)
        await sequence.eraseContextTokenRanges([{start: task.document.length, end}]);
}

const out = {};
if (task.restart) {
    // Its first evaluation sets up threads and buffers, as the first forward does elsewhere.
    await generate(task.document.slice(0, 20), 1);
    const [seconds] = await timed(async () => {
        await sequence.loadStateFromFile(task.state, {acceptRisk: true});
        await generate(task.suffixes[0], 1);
    });
    out.restart_s = seconds;
    await cutBack();
    out.reply = await generate(task.suffixes[0], task.tokens);
} else {
    [out.cold_s] = await timed(() => generate([...task.document, ...task.suffixes[0]], 1));
    out.warm_s = [];
    for (const suffix of task.suffixes) {
        await cutBack();
        out.warm_s.push((await timed(() => generate(suffix, 1)))[0]);
    }
    await cutBack();
    await sequence.saveStateToFile(task.state);
    out.reply = await generate(task.suffixes[0], task.tokens);
}
process.stdout.write("\n" + JSON.stringify(out) + "\n");
process.exit(0);
