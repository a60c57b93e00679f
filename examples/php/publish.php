<?php
// Publishes a job with php-amqplib:  BROKER_URL=amqps://… php publish.php job.json
//
// Ends with 0 once RabbitMQ has the job. After an error, publish the same job again: a repeat is harmless.
require 'PhpAmqpLib/autoload.php'; // of Debian's php-amqplib; with Composer: vendor/autoload.php

use PhpAmqpLib\Connection\AMQPConnectionConfig;
use PhpAmqpLib\Connection\AMQPConnectionFactory;
use PhpAmqpLib\Message\AMQPMessage;

$job = file_get_contents($argv[1]) ?: throw new RuntimeException("{$argv[1]} can't be read, or is empty");

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
$config->setReadTimeout(10);
$config->setWriteTimeout(10);

$connection = AMQPConnectionFactory::create($config);
$channel = $connection->channel();
$channel->confirm_select();
$channel->set_nack_handler(fn () => throw new RuntimeException('RabbitMQ refuses it'));
$channel->set_return_listener(fn () => throw new RuntimeException('no queue is bound for jobs'));
$channel->basic_publish(
    new AMQPMessage($job, [
        'content_type' => 'application/json',
        'content_encoding' => 'utf-8',
        'delivery_mode' => AMQPMessage::DELIVERY_MODE_PERSISTENT,
    ]),
    exchange: 'confirm-offer',
    routing_key: 'confirm-offer.jobs',
    mandatory: true,
);
$channel->wait_for_pending_acks_returns(10); // seconds, after which it throws
$connection->close();
echo "RabbitMQ has it\n";
