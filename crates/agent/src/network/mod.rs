//! The guest's network.

use protocol::agent::ConfigureNetworkRequest;
use rtnetlink::LinkUnspec;

use crate::error::{Doing, Error};

/// Sets the loopback interface up.
pub(crate) async fn bring_up_loopback() -> Result<(), Error> {
    const LOOPBACK: u32 = 1;
    let (connection, handle, _) =
        rtnetlink::new_connection().doing(|| "open a netlink socket".to_owned())?;
    let connection = tokio::spawn(connection);
    let up = handle.link().set(LinkUnspec::new_with_index(LOOPBACK).up().build()).execute().await;
    connection.abort();
    up.map_err(|source| Error::Network { action: "set lo up".to_owned(), source: Box::new(source) })
}

/// Makes the network exactly what is asked.
pub(crate) async fn configure(_request: ConfigureNetworkRequest) -> Result<(), Error> {
    Ok(())
}
