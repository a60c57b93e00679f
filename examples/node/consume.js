// Consumes events with amqplib:  BROKER_URL=amqps://… node consume.js
//
// amqplib reconnects by itself. Any other error ends the program. Started again, it receives what it did not
// acknowledge.
import amqplib from "amqplib";
import sqlite from "node-sqlite3-wasm";

const queue = process.env.QUEUE ?? "orders.booking-events";

const database = new sqlite.Database("orders.db"); // in place of yours; no other SQLite may open it while this runs
database.exec("create table if not exists latest (subject text primary key, id text, sequence integer)");
database.exec("create table if not exists mails (event_id text, type text, subject text)");
const NEWS = `
  insert into latest values (?, ?, ?)
  on conflict do update set id = excluded.id, sequence = excluded.sequence
  where excluded.id <> id and excluded.sequence > sequence`;

function handle(event) {
  database.exec("begin immediate"); // one transaction for the last event and your own work
  const isNews = database.run(NEWS, [event.subject, event.id, event.data.sequence]).changes;
  if (isNews) {
    // neither a repeat nor older than the last event
    database.run("insert into mails values (?, ?, ?)", [event.id, event.type, event.subject]); // your own work
  }
  database.exec("commit");
}

async function subscribe(connection) {
  const channel = await connection.createChannel();
  await channel.assertQueue(queue, { durable: true, arguments: { "x-queue-type": "quorum" } });
  await channel.bindQueue(queue, "booking-events", "#");
  await channel.prefetch(100);
  await channel.consume(queue, (message) => {
    try {
      handle(JSON.parse(message.content));
      channel.ack(message);
    } catch (error) {
      console.error(error);
      process.exit(1);
    }
  });
}

await amqplib.connect(process.env.BROKER_URL, { recovery: { setup: subscribe } });
