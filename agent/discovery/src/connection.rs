//! One stream to one address of the control plane, from its first request to its end.

use std::{path::Path, time::Duration};

use proto::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, metadata::MetadataValue, transport::Channel};

use crate::{books::NotAskedFor, client::Client, config::Config};

/// Requests under way. The control plane has one response under way for each type, and each is answered by one.
const REQUESTS: usize = 16;
/// Larger is no token.
const TOKEN_BYTES: u64 = 64 << 10;

/// Why a connection could not be made, or ended. All may be tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("the token file {0}: {1}")]
    Token(String, String),
    #[error("{0}")]
    Refused(#[from] Box<Status>),
    #[error("the control plane ended the stream")]
    Ended,
    #[error("the control plane does not take our requests")]
    Stuck,
    #[error("the control plane did not answer within {0:?}")]
    Silent(Duration),
    #[error(transparent)]
    NotAskedFor(#[from] NotAskedFor),
}

impl From<Status> for ConnectionError {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

/// A stream, of which nothing has been heard yet.
pub(crate) struct Connection {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Connection {
    /// Opens the stream with its first requests: some servers say nothing, not even headers, before they have one.
    pub(crate) async fn open(
        config: &Config,
        channel: Channel,
        first: Vec<DeltaDiscoveryRequest>,
    ) -> Result<Self, ConnectionError> {
        let (requests, receiver) = mpsc::channel(REQUESTS);
        for request in first {
            // There are three of them.
            requests.try_send(request).map_err(|_| ConnectionError::Stuck)?;
        }
        let mut request = Request::new(ReceiverStream::new(receiver));
        let metadata = request.metadata_mut();
        if let Some(file) = &config.token_file {
            let wrong = |why: String| ConnectionError::Token(file.display().to_string(), why);
            let token = read_token(file).await.map_err(wrong)?;
            let bearer = MetadataValue::try_from(format!("Bearer {token}"));
            let mut bearer = bearer.map_err(|_| wrong("it holds what no token does".to_owned()))?;
            bearer.set_sensitive(true);
            metadata.insert("authorization", bearer);
        }
        if let Ok(cluster) = MetadataValue::try_from(config.cluster.as_str()) {
            metadata.insert("clusterid", cluster);
        }
        let mut service =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(config.limits.response_bytes);
        let within = config.limits.answer;
        let opening = tokio::time::timeout(within, service.delta_aggregated_resources(request));
        let responses = opening.await.map_err(|_| ConnectionError::Silent(within))??;
        Ok(Self {
            requests,
            responses: responses.into_inner(),
        })
    }

    /// Serves the stream until it ends.
    pub(crate) async fn serve(mut self, client: &mut Client) -> ConnectionError {
        loop {
            if let Err(error) = self.turn(client).await {
                return error;
            }
        }
    }

    async fn turn(&mut self, client: &mut Client) -> Result<(), ConnectionError> {
        let within = client.config.limits.answer;
        let is_quiet = client.books.is_synchronised();
        let patience = async {
            match is_quiet {
                true => std::future::pending().await,
                false => tokio::time::sleep(within).await,
            }
        };
        tokio::select! {
            response = self.responses.message() => {
                let response = response?.ok_or(ConnectionError::Ended)?;
                let requests = client.take(response)?;
                self.send(requests, within).await
            }
            Some(wanted) = client.demands.next() => {
                let more = std::iter::from_fn(|| client.demands.try_next());
                let request = client.books.want(std::iter::once(wanted).chain(more));
                self.send(request, within).await
            }
            () = patience => Err(ConnectionError::Silent(within)),
        }
    }

    async fn send(
        &self,
        requests: impl IntoIterator<Item = DeltaDiscoveryRequest>,
        within: Duration,
    ) -> Result<(), ConnectionError> {
        for request in requests {
            match tokio::time::timeout(within, self.requests.send(request)).await {
                Ok(Ok(())) => {}
                // The stream is over: the responses tell why.
                Ok(Err(_)) => return Ok(()),
                Err(_) => return Err(ConnectionError::Stuck),
            }
        }
        Ok(())
    }
}

async fn read_token(file: &Path) -> Result<String, String> {
    let length = tokio::fs::metadata(file)
        .await
        .map_err(|error| error.to_string())?
        .len();
    if length > TOKEN_BYTES {
        return Err(format!("{length} bytes are too many for a token"));
    }
    let token = tokio::fs::read_to_string(file)
        .await
        .map_err(|error| error.to_string())?;
    match token.trim() {
        "" => Err("it is empty".to_owned()),
        token => Ok(token.to_owned()),
    }
}
