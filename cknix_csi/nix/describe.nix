# Applied to the value of an Expression: says in plain data what it is, so that one evaluation is enough.
value:
let
  arguments = builtins.functionArgs value;
  missing = builtins.filter (name: !arguments.${name}) (builtins.attrNames arguments);
  # `x: …` has no formal arguments either, but is not meant to be called with an empty set; only XML tells them apart.
  takesSet = builtins.isFunction value && builtins.match ".*<attrspat.*" (builtins.toXML value) != null;
  called = if takesSet && missing == [ ] then value { } else value;
  context = builtins.getContext text;
  text = "${called}";
  isDerivation = name: builtins.match ".*\\.drv" name != null;
  # Of an entry of the context: no names for all outputs, null for the derivation's own file, which is there already.
  wanted = entry: if entry.allOutputs or false then [ ] else entry.outputs or null;
  take = n: list: builtins.genList (builtins.elemAt list) (
    let length = builtins.length list; in if length < n then length else n
  );
in
if builtins.isFunction called then
  { kind = "function"; missing = if builtins.isFunction value then missing else [ ]; }
else if builtins.isAttrs called && (called.type or null) == "derivation" then
  {
    kind = "derivation";
    path = called.outPath;
    derivations = [ { path = called.drvPath; outputs = [ (called.outputName or "out") ]; } ];
  }
else if builtins.isString called || builtins.isPath called then
  {
    kind = "path";
    path = text;
    derivations = map (name: { path = name; outputs = wanted context.${name}; })
      (builtins.filter (name: isDerivation name && wanted context.${name} != null) (builtins.attrNames context));
  }
else if builtins.isAttrs called then
  { kind = "set"; names = take 12 (builtins.attrNames called); }
else
  { kind = builtins.typeOf called; }
