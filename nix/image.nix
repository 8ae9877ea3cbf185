# The image of controller and node.  One layer for each popular store path, so that an update moves little.
{
  lib,
  buildEnv,
  cacert,
  dockerTools,
  cknix-csi,
  nix2container,
}:
nix2container.buildImage {
  name = "cknix-csi";
  tag = cknix-csi.version;
  maxLayers = 64;

  copyToRoot = buildEnv {
    name = "cknix-root";
    paths = [
      # A user database, TLS roots where every program looks for them, and /bin/sh.
      dockerTools.fakeNss
      dockerTools.caCertificates
      dockerTools.binSh
      cknix-csi
    ];
    pathsToLink = [
      "/bin"
      "/etc"
    ];
  };

  config = {
    Entrypoint = [ (lib.getExe cknix-csi) ];
    Env = [
      "PATH=/bin"
      "SSL_CERT_FILE=${cacert}/etc/ssl/certs/ca-bundle.crt"
      "NIX_SSL_CERT_FILE=${cacert}/etc/ssl/certs/ca-bundle.crt"
      "HOME=/tmp"
    ];
  };
}
