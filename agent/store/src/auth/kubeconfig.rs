//! The administrator's kubeconfig: where the server is, whom it must be, and a client certificate, all in one text.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::certs::{Authority, CertificateError, Pair, pem};

/// The name of cluster and context, as kubectl shows them.
const NAME: &str = "undercurrent";
/// The administrator, as in kubeadm's.
const USER: &str = "kubernetes-admin";
/// The group that may do everything.
const GROUP: &str = "system:masters";

/// The administrator's certificate and key.
pub fn administrator(authority: &Authority) -> Result<Pair, CertificateError> {
    authority.client(USER, GROUP)
}

/// A kubeconfig for the administrator of the server at this URL.
pub fn kubeconfig(authority: &Authority, administrator: &Pair, url: &str) -> String {
    let ca = STANDARD.encode(authority.certificate_pem());
    let certificate = STANDARD.encode(pem("CERTIFICATE", &administrator.certificate));
    let key = STANDARD.encode(pem("PRIVATE KEY", &administrator.key));
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: {NAME}
  cluster:
    server: {url}
    certificate-authority-data: {ca}
contexts:
- name: {NAME}
  context:
    cluster: {NAME}
    user: {USER}
current-context: {NAME}
preferences: {{}}
users:
- name: {USER}
  user:
    client-certificate-data: {certificate}
    client-key-data: {key}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_kubeconfig_with_everything_inline() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::open(directory.path()).unwrap();
        let administrator = administrator(&authority).unwrap();
        let text = kubeconfig(&authority, &administrator, "https://127.0.0.1:6443");
        let config: kube::config::Kubeconfig = serde_yaml_ng::from_str(&text).unwrap();
        let cluster = config.clusters[0].cluster.as_ref().unwrap();
        assert_eq!(cluster.server.as_deref(), Some("https://127.0.0.1:6443"));
        assert_eq!(config.current_context.as_deref(), Some("undercurrent"));
        assert!(
            config.auth_infos[0]
                .auth_info
                .as_ref()
                .unwrap()
                .client_key_data
                .is_some()
        );
    }
}
