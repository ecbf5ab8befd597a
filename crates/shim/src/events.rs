//! Events: what containerd is told of tasks, in the order in which it happened.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{MessageField, MessageFull};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context::with_duration;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::{debug, warn};

/// How many events may wait while containerd is not there.
const LONGEST_QUEUE: usize = 2048;

/// How often one event is tried, and how long a try may take; between two tries is one second more each time.
const TRIES: u32 = 6;
const TRY: Duration = Duration::from_secs(5);

/// Takes events and forwards them to containerd.
#[derive(Debug)]
pub(crate) struct Publisher {
    namespace: String,
    queue: RefCell<Option<mpsc::Sender<Envelope>>>,
    lost: Cell<u64>,
}

impl Publisher {
    /// A publisher to the containerd that takes events at `address`, and the work that it needs done.
    pub(crate) fn new(
        namespace: &str,
        address: String,
    ) -> (Self, impl Future<Output = ()> + use<>) {
        let (queue, events) = mpsc::channel(LONGEST_QUEUE);
        let publisher = Self {
            namespace: namespace.to_owned(),
            queue: RefCell::new(Some(queue)),
            lost: Cell::new(0),
        };
        (publisher, forward(address, events))
    }

    /// Publishes `event` under `topic`, `/tasks/start`. Does not wait.
    pub(crate) fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        let value = event.write_to_bytes().unwrap_or_default();
        let descriptor = M::descriptor();
        let any = Any { type_url: descriptor.full_name().to_owned(), value, ..Default::default() };
        let envelope = Envelope {
            timestamp: MessageField::some(Timestamp::now()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(any),
            ..Default::default()
        };
        debug!(topic, "event");
        let queue = self.queue.borrow();
        let queued = queue.as_ref().is_some_and(|queue| queue.try_send(envelope).is_ok());
        if !queued {
            self.lost.set(self.lost.get() + 1);
            warn!(topic, lost = self.lost.get(), "containerd takes no events: one is lost");
        }
    }
}

impl Publisher {
    /// Takes no more events; those that it has are still forwarded.
    pub(crate) fn close(&self) {
        self.queue.take();
    }
}

async fn forward(address: String, mut events: mpsc::Receiver<Envelope>) {
    let mut client = None;
    while let Some(envelope) = events.recv().await {
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: Some(envelope).into(), ..Default::default() };
        for attempt in 1..=TRIES {
            match send(&address, &mut client, &request).await {
                Ok(()) => break,
                Err(error) if attempt == TRIES => warn!(topic, error, "an event is lost"),
                Err(error) => {
                    debug!(topic, error, "containerd did not take an event");
                    client = None;
                    sleep(Duration::from_secs(attempt.into())).await;
                }
            }
        }
    }
}

async fn send(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> Result<(), String> {
    let client = if let Some(client) = client {
        client
    } else {
        let connected = Client::connect(&format!("unix://{address}")).await;
        client.insert(EventsClient::new(connected.map_err(|error| error.to_string())?))
    };
    let context = with_duration(TRY);
    client.forward(context, request).await.map(drop).map_err(|error| error.to_string())
}

/// Where containerd takes events: what it said at the start, or its environment, or beside its own address.
pub(crate) fn address(told: &str, grpc: &str) -> String {
    let environment = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let address = match (told, environment.as_str()) {
        ("", "") => format!("{grpc}.ttrpc"),
        ("", environment) => environment.to_owned(),
        (told, _) => told.to_owned(),
    };
    address.strip_prefix("unix://").map_or(address.clone(), str::to_owned)
}
