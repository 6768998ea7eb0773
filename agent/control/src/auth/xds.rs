//! The same callers, for xDS: any service account whose token is good may listen, as with istiod.

use std::net::SocketAddr;

use futures_util::future::BoxFuture;
use http::HeaderMap;
use tonic::{Status, metadata::MetadataMap};

use super::{Authenticator, bearer};
use crate::xds::{Authenticate, Caller};

impl Authenticate for Authenticator {
    fn authenticate<'a>(
        &'a self,
        headers: &'a HeaderMap,
        _peer: Option<SocketAddr>,
    ) -> BoxFuture<'a, Result<Caller, Status>> {
        Box::pin(async move {
            let metadata = MetadataMap::from_headers(headers.clone());
            let token = bearer(&metadata).map_err(|error| error.status())?;
            let caller = self.caller(token).await.map_err(|error| error.status())?;
            Ok(Caller {
                name: caller.to_string(),
            })
        })
    }
}
