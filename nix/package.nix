# `cknix-csi` from nixpkgs' Python.  Nearly everything is in nixpkgs; what it lacks, or has in an older version than
# pyproject.toml asks for, is the wheel that requirements.lock names (all of them pure Python).
{
  lib,
  python3Packages,
  fetchPypi,
  makeWrapper,
  e2fsprogs,
  gitMinimal,
  nix,
  openssh,
  util-linux,
}:
let
  py = python3Packages;
  project = (lib.importTOML ../pyproject.toml).project;

  wheel =
    {
      pname,
      version,
      hash,
      dependencies,
      python ? "py3",
    }:
    let
      own = py.${pname} or null;
    in
    if own != null && lib.versionAtLeast own.version version then
      own
    else
      py.buildPythonPackage {
        inherit pname version dependencies;
        format = "wheel";
        src = fetchPypi {
          pname = lib.replaceStrings [ "-" ] [ "_" ] pname;
          inherit version hash python;
          format = "wheel";
          dist = python;
        };
        # Their own bounds are those of PyPI's newest; nixpkgs has one version of everything.
        pythonRelaxDeps = true;
      };

  aiopath = wheel {
    pname = "aiopath";
    version = "0.7.7";
    python = "py2.py3";
    hash = "sha256-zV0Y3o7eFn4dtlnwLuRI/ghfkjy44ZRAfMxWi//E/k4=";
    dependencies = [
      py.aiofile
      py.anyio
    ];
  };

  kopf = wheel {
    pname = "kopf";
    version = "1.45.2";
    hash = "sha256-FFglCd/fbZsBmWkU0cFye+xYdAs84iTVWaosDZJVeAs=";
    dependencies = [
      py.aiohttp
      py.click
      py.iso8601
      py.jsonpatch
      py.python-json-logger
      py.pyyaml
    ];
  };

  kubernetes-asyncio = wheel {
    pname = "kubernetes-asyncio";
    version = "36.1.0";
    hash = "sha256-bSWRXRq/8k/O2lUaUCII2Yb2dNclhil6pYvH1V5/6vM=";
    dependencies = [
      py.aiohttp
      py.certifi
      py.python-dateutil
      py.pyyaml
      py.six
      py.urllib3
    ];
  };
in
py.buildPythonApplication {
  pname = project.name;
  inherit (project) version;
  pyproject = true;

  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../LICENSE
      ../README.md
      ../cknix_csi
      ../nix/demo
      ../pyproject.toml
    ];
  };

  build-system = [ py.hatchling ];

  dependencies = [
    aiopath
    kopf
    kubernetes-asyncio
    py.aiohttp
    py.aiosqlite
    py.cryptography
    py.grpclib
    py.prometheus-client
    py.protobuf
    py.pyyaml
  ];
  pythonRelaxDeps = true;

  # What it runs: Nix, what Nix runs for git and ssh flakes, and mkfs for volumes with a size limit.
  nativeBuildInputs = [ makeWrapper ];
  makeWrapperArgs = [
    "--prefix"
    "PATH"
    ":"
    (lib.makeBinPath [
      e2fsprogs
      gitMinimal
      nix
      openssh
      util-linux
    ])
  ];

  # The tests need root, a cluster and several versions of Nix: `make test`.
  doCheck = false;
  pythonImportsCheck = [ "cknix_csi" ];

  meta = {
    inherit (project) description;
    mainProgram = "cknix-csi";
    license = lib.licenses.mit;
    platforms = lib.platforms.linux;
  };
}
