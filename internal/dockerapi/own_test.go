package dockerapi

import (
	"context"
	"io"

	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/engine"
	"github.com/cloudos-io/cloudos/internal/policy"
)

// ownCases has lines for routes below /servin/.
var ownCases = []routeCase{
	{method: "GET", path: "/servin/volumes/v/backup?pause=1&size=1", status: 200, call: "backup v pause=true", answer: "archive"},
	{method: "GET", path: "/servin/volumes/v/export", status: 200, call: "export v pause=false", answer: "tar"},
	{method: "POST", path: "/servin/volumes/v/restore?replace=1", body: "abc", status: 200, call: "restore v replace=true devices=false abc", answer: `"SHA256":"s"`},
	{method: "POST", path: "/servin/volumes/v/import?devices=1", body: "abc", status: 204, call: "import v replace=false devices=true abc"},
	{method: "POST", path: "/servin/volumes/v/clone", body: `{"Name":"w","Pause":true}`, status: 201, call: "clone v w pause=true", answer: `"Name":"w"`},

	{method: "GET", path: "/servin/os/status", status: 200, answer: "passed GET /servin/os/status"},
	{method: "POST", path: "/servin/os/upgrade?reboot=1", body: "tar", status: 200, answer: "passed POST /servin/os/upgrade?reboot=1 tar"},
	{method: "POST", path: "/servin/os/rollback", status: 200, answer: "passed POST /servin/os/rollback"},
	{method: "POST", path: "/servin/os/reboot", status: 200, answer: "passed POST /servin/os/reboot"},
	{method: "GET", path: "/servin/os/config", status: 200, answer: "passed GET /servin/os/config"},
	{method: "PUT", path: "/servin/os/config?reboot=1", body: "version: 1", status: 200, answer: "passed PUT /servin/os/config?reboot=1 version: 1"},
	{method: "POST", path: "/servin/os/recovery", status: 200, answer: "passed POST /servin/os/recovery"},
	{method: "GET", path: "/servin/os/log?source=kernel", status: 200, answer: "passed GET /servin/os/log?source=kernel"},
	{method: "GET", path: "/servin/signatures?image=a", status: 501, answer: "cannot look for signatures"},
	{method: "GET", path: "/servin/signatures", status: 400, answer: "names none"},

	{method: "POST", path: "/containers/web/checkpoints", body: `{"CheckpointID":"c1","Exit":true}`, status: 201, call: `checkpoint web {"CheckpointID":"c1","Exit":true}`},
	{method: "GET", path: "/containers/web/checkpoints?dir=/d", status: 200, call: `checkpoints web "/d"`, answer: "[]"},
	{method: "DELETE", path: "/containers/web/checkpoints/c1?dir=/d", status: 204, call: `checkpoint remove web c1 "/d"`},
	{method: "POST", path: "/containers/web/start?checkpoint=c1&checkpoint-dir=/d", status: 204, call: "start web"},
	{method: "POST", path: "/containers/web/start?checkpoint=-c1", status: 400, answer: "invalid checkpoint ID"},
	{method: "POST", path: "/containers/web/start?checkpoint-dir=/d", status: 400, answer: "needs the checkpoint's name"},
	{method: "POST", path: "/servin/containers/web/restore", body: `{"Checkpoint":"c1","Name":"w2"}`, status: 201, call: `restore web {"Checkpoint":"c1","Name":"w2"}`, answer: `"ID":"r"`},
	{method: "POST", path: "/servin/checkpoints/import?options=%7B%22Name%22%3A%22w%22%7D", body: "tar", status: 201, call: `import checkpoint {"Name":"w"} tar`, answer: `"ID":"i"`},
	{method: "POST", path: "/servin/checkpoints/import?options=x", body: "tar", status: 400, answer: "cannot read the options"},

	{method: "GET", path: "/servin/debug-shell", status: 501, answer: "does not run CloudOS"},
	{method: "POST", path: "/servin/debug-shell", body: `{"for":"1h","reason":"r"}`, status: 501, answer: "does not run CloudOS"},
	{method: "DELETE", path: "/servin/debug-shell", status: 501, answer: "does not run CloudOS"},
	{method: "POST", path: "/servin/run", body: `{"Config":{},"Extra":{"Debug":"@host"}}`, status: 400, answer: "is opened by POST /servin/debug-shell/run"},
	{method: "POST", path: "/servin/debug-shell/run", body: `{"Config":{"Image":"x"}}`, status: 400, answer: "nothing else is"},
	{method: "DELETE", path: "/servin/debug-shell/abc", status: 501, answer: "does not run CloudOS"},

	{method: "GET", path: "/servin/policy", status: 200, call: "policy", answer: `"Path":"/p"`},
	{method: "POST", path: "/servin/policy/reload", status: 204, call: "policy reload"},
	{method: "POST", path: "/servin/policy/check", body: "version: 1\nrules: [{name: a}]\n", status: 200, answer: `"Rules":1`},
	{method: "POST", path: "/servin/policy/check", body: "version: 1\nruels: []\n", status: 400, answer: "ruels"},
	{method: "POST", path: "/servin/policy/test", body: `{"Config":{"Image":"i"}}`, status: 200, call: "policy test i", answer: `{"Allowed":false,"Violations":["policy rule \"r\" refuses x"]}`},
	{method: "POST", path: "/servin/policy/test", body: `{}`, status: 400, answer: "config cannot be empty"},
	{method: "GET", path: "/servin/audit", status: 404, answer: "keeps no audit log"},
	{method: "GET", path: "/servin/audit/verify", status: 404, answer: "keeps no audit log"},

	{method: "GET", path: "/servin/secrets", status: 200, call: "secrets secret", answer: "[]"},
	{method: "POST", path: "/servin/secrets", body: `{"Name":"s","Data":"aGk="}`, status: 201, call: "create secret s hi", answer: `"Name":"s"`},
	{method: "POST", path: "/servin/secrets", body: `{"Name":"s","Data":"top secret"}`, status: 400, answer: "cannot read the secret: the body must be"},
	{method: "GET", path: "/servin/secrets/s", status: 200, call: "inspect secret s"},
	{method: "POST", path: "/servin/secrets/s/update", body: `{"Data":"aGk="}`, status: 200, call: "update secret s hi"},
	{method: "DELETE", path: "/servin/secrets/s?force=1", status: 204, call: "remove secret s force=true"},
	{method: "POST", path: "/servin/secrets/unlock", body: `{"Passphrase":"p"}`, status: 204, call: "unlock p"},
	{method: "POST", path: "/servin/secrets/lock", status: 204, call: "lock"},
	{method: "POST", path: "/servin/secrets/rotate-key", body: `{"Passphrase":"p"}`, status: 204, call: "rekey p"},
	{method: "GET", path: "/servin/configs", status: 200, call: "secrets config"},
	{method: "POST", path: "/servin/configs", body: `{"Name":"c","Data":"aGk="}`, status: 201, call: "create config c hi"},
	{method: "GET", path: "/servin/configs/c", status: 200, call: "inspect config c"},
	{method: "POST", path: "/servin/configs/c/update", body: `{"Data":"aGk="}`, status: 200, call: "update config c hi"},
	{method: "DELETE", path: "/servin/configs/c", status: 204, call: "remove config c force=false"},
	{method: "POST", path: "/containers/create", body: `{"Image":"i","Labels":{"io.servin.secrets":"a,target=/x,mode=400; b"}}`, status: 201, call: `"Secrets":[{"Kind":"secret","Name":"a","Target":"/x","Mode":256},{"Kind":"secret","Name":"b"}]`},
	{method: "POST", path: "/containers/create", body: `{"Image":"i","Labels":{"io.servin.secrets":"a,mode=9"}}`, status: 400, answer: "invalid label io.servin.secrets"},
}

func (f *fake) Status() api.Policy {
	_ = f.call("policy")
	return api.Policy{Path: "/p"}
}
func (f *fake) Reload() error { return f.call("policy reload") }

func (f *fake) PolicyTest(_ context.Context, req CreateRequest) ([]policy.Violation, error) {
	return []policy.Violation{{Rule: "r", What: "x"}}, f.call("policy test %s", req.Config.Image)
}

func (f *fake) SecretCreate(_ context.Context, k api.SecretKind, s api.SecretSpec) (api.Secret, error) {
	return api.Secret{Name: s.Name}, f.call("create %s %s %s", k, s.Name, s.Data)
}

func (f *fake) SecretList(_ context.Context, k api.SecretKind) ([]api.Secret, error) {
	return nil, f.call("secrets %s", k)
}

func (f *fake) SecretInspect(_ context.Context, k api.SecretKind, ref string) (api.Secret, error) {
	return api.Secret{}, f.call("inspect %s %s", k, ref)
}

func (f *fake) SecretUpdate(_ context.Context, k api.SecretKind, ref string, s api.SecretSpec) (api.SecretUpdated, error) {
	return api.SecretUpdated{}, f.call("update %s %s %s", k, ref, s.Data)
}

func (f *fake) SecretRemove(_ context.Context, k api.SecretKind, ref string, force bool) error {
	return f.call("remove %s %s force=%t", k, ref, force)
}

func (f *fake) SecretUnlock(_ context.Context, p string) error { return f.call("unlock %s", p) }
func (f *fake) SecretLock(context.Context) error               { return f.call("lock") }
func (f *fake) SecretRekey(_ context.Context, p string) error  { return f.call("rekey %s", p) }

func (f *fake) VolumeBackup(_ context.Context, name string, o engine.CopyVolumeOptions, w io.Writer) (api.VolumeArchive, error) {
	if o.Size != nil {
		o.Size(7)
	}
	if err := f.call("backup %s pause=%t", name, o.Pause); err != nil {
		return api.VolumeArchive{}, err
	}
	_, err := io.WriteString(w, "archive")
	return api.VolumeArchive{}, err
}

func (f *fake) VolumeExport(_ context.Context, name string, o engine.CopyVolumeOptions, w io.Writer) error {
	if err := f.call("export %s pause=%t", name, o.Pause); err != nil {
		return err
	}
	_, err := io.WriteString(w, "tar")
	return err
}

func (f *fake) VolumeRestore(_ context.Context, name string, o engine.RestoreOptions, r io.Reader) (api.VolumeArchive, error) {
	b, _ := io.ReadAll(r)
	return api.VolumeArchive{SHA256: "s"}, f.call("restore %s replace=%t devices=%t %s", name, o.Replace, o.Devices, b)
}

func (f *fake) VolumeImport(_ context.Context, name string, o engine.RestoreOptions, r io.Reader) error {
	b, _ := io.ReadAll(r)
	return f.call("import %s replace=%t devices=%t %s", name, o.Replace, o.Devices, b)
}

func (f *fake) VolumeClone(_ context.Context, name string, o api.VolumeClone) (*volume.Volume, error) {
	return &volume.Volume{Name: o.Name}, f.call("clone %s %s pause=%t", name, o.Name, o.Pause)
}
