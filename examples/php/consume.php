<?php
// Consumes events with php-amqplib:  BROKER_URL=amqps://… php consume.php
//
// php-amqplib does not reconnect by itself: an error ends the program, and a supervisor has to start it again. It then
// receives what it did not acknowledge.
require 'PhpAmqpLib/autoload.php'; // of Debian's php-amqplib; with Composer: vendor/autoload.php

use PhpAmqpLib\Connection\AMQPConnectionConfig;
use PhpAmqpLib\Connection\AMQPConnectionFactory;
use PhpAmqpLib\Message\AMQPMessage;
use PhpAmqpLib\Wire\AMQPTable;

$queue = getenv('QUEUE') ?: 'orders.booking-events';

$database = new PDO('sqlite:orders.db'); // in place of yours
$database->exec('create table if not exists latest (subject text primary key, id text, sequence integer)');
$database->exec('create table if not exists mails (event_id text, type text, subject text)');
$news = $database->prepare('
    insert into latest values (?, ?, ?)
    on conflict do update set id = excluded.id, sequence = excluded.sequence
    where excluded.id <> id and excluded.sequence > sequence');
$mail = $database->prepare('insert into mails values (?, ?, ?)');

$handle = function (AMQPMessage $message) use ($database, $news, $mail): void {
    $event = json_decode($message->getBody(), true, flags: JSON_THROW_ON_ERROR);
    $database->beginTransaction(); // one transaction for the last event and your own work
    $news->execute([$event['subject'], $event['id'], $event['data']['sequence']]);
    if ($news->rowCount()) { // neither a repeat nor older than the last event
        $mail->execute([$event['id'], $event['type'], $event['subject']]); // your own work
    }
    $database->commit();
    $message->ack();
};

$url = parse_url(getenv('BROKER_URL'));
$secure = $url['scheme'] === 'amqps';
$config = new AMQPConnectionConfig();
$config->setHost($url['host']);
$config->setPort($url['port'] ?? ($secure ? 5671 : 5672));
$config->setUser(rawurldecode($url['user'] ?? 'guest'));
$config->setPassword(rawurldecode($url['pass'] ?? 'guest'));
$config->setVhost(rawurldecode(substr($url['path'] ?? '', 1)) ?: '/');
$config->setIsSecure($secure);
$config->setNetworkProtocol($secure ? 'tls' : 'tcp'); // setIsSecure alone does not encrypt (3.5)
$config->setSslVerify(true);
$config->setSslVerifyName(true);
$config->setConnectionTimeout(10); // seconds; the default of 3 is short for TLS on a busy machine
$config->setWriteTimeout(10);

$channel = AMQPConnectionFactory::create($config)->channel();
$quorum = new AMQPTable(['x-queue-type' => 'quorum']);
$channel->queue_declare($queue, durable: true, auto_delete: false, arguments: $quorum);
$channel->queue_bind($queue, 'booking-events', '#');
$channel->basic_qos(0, 100, false);
$channel->basic_consume($queue, callback: $handle);
while ($channel->is_consuming()) {
    $channel->wait();
}
