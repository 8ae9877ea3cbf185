# The image of controller and node.  One layer for each popular store path, so that an update moves little.
{
  lib,
  buildEnv,
  cacert,
  dockerTools,
  cknix-csi,
  nix2container,
}:
let
  buildUsers = builtins.genList (n: n + 1) 32;
in
nix2container.buildImage {
  name = "cknix-csi";
  tag = cknix-csi.version;
  maxLayers = 64;

  copyToRoot = buildEnv {
    name = "cknix-root";
    paths = [
      # A user database, TLS roots where every program looks for them, and /bin/sh.
      (dockerTools.fakeNss.override {
        # What Nix builds as: users who own nothing.
        extraGroupLines = [
          "nixbld:x:30000:${builtins.concatStringsSep "," (map (n: "nixbld${toString n}") buildUsers)}"
        ];
        extraPasswdLines = map (
          n: "nixbld${toString n}:x:${toString (30000 + n)}:30000:Nix build user ${toString n}:/var/empty:/noshell"
        ) buildUsers;
      })
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
