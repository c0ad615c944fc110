//! The least that anything on this broker and this library needs to do the same: consume the same
//! messages and publish as many of the same size, confirmed, to a queue of tasks and, by the clients'
//! topic exchange, to those who listen to each job; without a database, without looking into them.

use std::collections::{BTreeMap, HashSet};
use std::thread;
use std::time::Instant;

use amiquip::{
    AmqpProperties, AmqpValue, Channel, Confirm, ConsumerMessage, ConsumerOptions, Delivery,
    FieldTable, Publish, QueueDeclareOptions, QueueDeleteOptions,
};
use anyhow::{Context, bail};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::wire::{OMOTES_EXCHANGE, TASK_QUEUE_MAX_PRIORITY};
use uuid::Uuid;

use crate::load::{Sample, Samples, open};

const IN: &str = "bench.floor.in";
const TASKS: &str = "bench.floor.tasks";
const CLIENTS: &str = "bench.floor.clients";
/// As many as make it fastest on two cores.
const THREADS: usize = 4;
const PREFETCH: u16 = 2000;
const MAX_BATCH: usize = 200;

/// Messages per second, from the tenth part on.
///
/// # Errors
/// RabbitMQ is gone.
pub fn run(config: &Config, messages: usize, samples: &Samples) -> anyhow::Result<f64> {
    let mut setup = open(&config.sdk_rabbitmq)?;
    let channel = setup.open_channel(None)?;
    for queue in [IN, TASKS, CLIENTS] {
        let mut options = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        if queue == TASKS {
            let priority = AmqpValue::LongInt(TASK_QUEUE_MAX_PRIORITY);
            options.arguments = FieldTable::from([("x-max-priority".to_owned(), priority)]);
        }
        channel.queue_declare(queue, options)?;
    }
    let keys: Vec<String> = (0..messages)
        .map(|_| format!("jobs.{}.floor", Uuid::new_v4()))
        .collect();
    for key in &keys {
        channel.queue_bind_nowait(CLIENTS, OMOTES_EXCHANGE, key.as_str(), FieldTable::new())?;
    }
    channel.queue_declare_passive(CLIENTS)?;
    let (confirms, _returns) = confirming(&channel)?;
    let body = vec![b'x'; samples.incoming];
    let at_once = (4 * 1024 * 1024 / samples.incoming.max(1)).clamp(1, 500);
    let mut left = messages;
    let mut tags = 0;
    while left > 0 {
        let count = left.min(at_once);
        for _ in 0..count {
            let properties = AmqpProperties::default().with_delivery_mode(2);
            publish(&channel, "", IN, &body, properties)?;
        }
        await_confirms(&confirms, &mut tags, count)?;
        left -= count;
    }

    let rate = relay(config, keys, samples)?;
    for queue in [IN, TASKS, CLIENTS] {
        channel.queue_delete(queue, QueueDeleteOptions::default())?;
    }
    setup.close()?;
    Ok(rate)
}

/// Works the queue off: one message for each of the clients' keys.
fn relay(config: &Config, keys: Vec<String>, samples: &Samples) -> anyhow::Result<f64> {
    let messages = keys.len() as u64;
    let mut keys = keys.into_iter();
    let mut incoming = open(&config.sdk_rabbitmq)?;
    let mut to_clients = open(&config.sdk_rabbitmq)?;
    let mut to_workers = open(&config.sdk_rabbitmq)?;
    let consumer_channel = incoming.open_channel(None)?;
    consumer_channel.qos(0, PREFETCH, false)?;
    let (hand_over, handed_over) = bounded(usize::from(PREFETCH));
    let (done, all_done) = unbounded();
    let mut workers = Vec::new();
    for _ in 0..THREADS {
        let clients = to_clients.open_channel(None)?;
        let tasks = match &samples.task {
            Some(sample) => Some((to_workers.open_channel(None)?, sample.clone())),
            None => None,
        };
        let (handed_over, done) = (handed_over.clone(), done.clone());
        let client = samples.client.clone();
        workers.push(thread::spawn(move || {
            work(&handed_over, &done, &(clients, client), tasks.as_ref())
        }));
    }
    drop(done);
    let consumer = consumer_channel.basic_consume(IN, ConsumerOptions::default())?;
    let deliveries = consumer.receiver().clone();
    // One acknowledgement for all before it is the cheapest.
    let mut finished = BTreeMap::new();
    let mut acknowledged = 0;
    let mut began = None;
    while acknowledged < messages {
        crossbeam_channel::select! {
            recv(deliveries) -> message => match message? {
                ConsumerMessage::Delivery(delivery) => {
                    let key = keys.next().context("a message too many")?;
                    hand_over.send((delivery, key))?;
                }
                other => bail!("{other:?}"),
            },
            recv(all_done) -> delivery => {
                let delivery: Delivery = delivery.context("the floor's threads have ended")?;
                for delivery in [delivery].into_iter().chain(all_done.try_iter()) {
                    finished.insert(delivery.delivery_tag(), delivery);
                }
                let mut last = None;
                while let Some(delivery) = finished.remove(&(acknowledged + 1)) {
                    last = Some(delivery);
                    acknowledged += 1;
                }
                if let Some(last) = last {
                    last.ack_multiple(&consumer_channel)?;
                }
                if began.is_none() && acknowledged >= messages / 10 {
                    began = Some((Instant::now(), acknowledged));
                }
            }
        }
    }
    let (began, before) = began.context("too few messages")?;
    let time = began.elapsed();
    drop(hand_over);
    for worker in workers {
        worker.join().expect("it does not panic")?;
    }
    drop(consumer);
    incoming.close()?;
    to_clients.close()?;
    to_workers.close()?;
    Ok((acknowledged - before) as f64 / time.as_secs_f64())
}

fn work(
    handed_over: &Receiver<(Delivery, String)>,
    done: &Sender<Delivery>,
    (clients, client): &(Channel, Sample),
    tasks: Option<&(Channel, Sample)>,
) -> anyhow::Result<()> {
    let (client_confirms, _client_returns) = confirming(clients)?;
    let task_confirms = tasks.map(|(channel, _)| confirming(channel)).transpose()?;
    let client_body = vec![b'x'; client.bytes];
    let task_body = vec![b'x'; tasks.map_or(0, |(_, task)| task.bytes)];
    let (mut client_tags, mut task_tags) = (0, 0);
    while let Ok(first) = handed_over.recv() {
        let mut batch = vec![first];
        let mut bytes = batch[0].0.body.len();
        while batch.len() < MAX_BATCH && bytes < 8 * 1024 * 1024 {
            let Ok(next) = handed_over.try_recv() else {
                break;
            };
            bytes += next.0.body.len();
            batch.push(next);
        }
        for (_, key) in &batch {
            if let Some((channel, task)) = tasks {
                publish(channel, "", TASKS, &task_body, task.properties.clone())?;
            }
            let properties = client.properties.clone();
            publish(clients, OMOTES_EXCHANGE, key, &client_body, properties)?;
        }
        if let Some((confirms, _)) = &task_confirms {
            await_confirms(confirms, &mut task_tags, batch.len())?;
        }
        await_confirms(&client_confirms, &mut client_tags, batch.len())?;
        for (delivery, _) in batch {
            done.send(delivery)?;
        }
    }
    Ok(())
}

fn confirming(channel: &Channel) -> anyhow::Result<(Receiver<Confirm>, Receiver<amiquip::Return>)> {
    let confirms = channel.listen_for_publisher_confirms()?;
    let returns = channel.listen_for_returns()?;
    channel.enable_publisher_confirms()?;
    Ok((confirms, returns))
}

fn publish(
    channel: &Channel,
    exchange: &str,
    key: &str,
    body: &[u8],
    properties: AmqpProperties,
) -> anyhow::Result<()> {
    Ok(channel.basic_publish(exchange, Publish::with_properties(body, key, properties))?)
}

/// Waits for the confirms of `count` messages more than `tags` so far.
fn await_confirms(
    confirms: &Receiver<Confirm>,
    tags: &mut u64,
    count: usize,
) -> anyhow::Result<()> {
    let mut open: HashSet<u64> = (*tags + 1..=*tags + count as u64).collect();
    *tags += count as u64;
    while !open.is_empty() {
        match confirms.recv()? {
            Confirm::Ack(ack) if ack.multiple => open.retain(|tag| *tag > ack.delivery_tag),
            Confirm::Ack(ack) => {
                open.remove(&ack.delivery_tag);
            }
            Confirm::Nack(_) => bail!("the broker refuses a message"),
        }
    }
    Ok(())
}
