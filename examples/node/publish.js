// Publishes a job with amqplib:  BROKER_URL=amqps://… node publish.js job.json
//
// Ends with 0 once RabbitMQ has the job. After an error, publish the same job again: a repeat is harmless.
import { readFileSync } from "node:fs";
import amqplib from "amqplib";

const job = readFileSync(process.argv[2]);

// While RabbitMQ is short of memory or disk, it does not answer.
setTimeout(() => {
  console.error("no answer within 10 seconds");
  process.exit(1);
}, 10_000).unref();

const connection = await amqplib.connect(process.env.BROKER_URL);
const channel = await connection.createConfirmChannel();

let returned = false; // RabbitMQ returns a message that no queue is bound for, and then confirms it
channel.on("return", () => {
  returned = true;
});
channel.publish("confirm-offer", "confirm-offer.jobs", job, {
  mandatory: true,
  persistent: true,
  contentType: "application/json",
  contentEncoding: "utf-8",
});
await channel.waitForConfirms(); // throws if RabbitMQ refuses it
await connection.close();

if (returned) throw new Error("no queue is bound for jobs");
console.log("RabbitMQ has it");
