package classic

import (
	"encoding/base64"
	"net/http/httptest"
	"net/url"
	"testing"
)

func TestParse(t *testing.T) {
	q := url.Values{
		"t": {"a", "a:latest", "reg:5000/b:c"}, "buildargs": {`{"A":"1","B":null}`}, "labels": {`{"l":"v"}`}, "extrahosts": {"h:1.2.3.4", "six=[::1]"},
		"networkmode": {"host"}, "memory": {"64"}, "shmsize": {"0"}, "cpusetcpus": {"0-1"}, "nocache": {"1"}, "pull": {"true"}, "target": {"x"},
		"cachefrom": {`["c"]`}, "ulimits": {`[{"Name":"nofile","Soft":1,"Hard":2}]`}, "platform": {"linux/ARM64"}, "rm": {"1"}, "q": {"0"},
	}
	r := httptest.NewRequest("POST", "/build?"+q.Encode(), nil)
	r.Header.Set("X-Registry-Config", base64.URLEncoding.EncodeToString([]byte(`{"reg:5000":{"username":"u","password":"p"}}`)))
	o, err := parse(r)
	if err != nil {
		t.Fatal(err)
	}
	if o.names() != "docker.io/library/a:latest,reg:5000/b:c" || o.version != 1 || o.quiet {
		t.Errorf("%+v", o)
	}
	for k, want := range map[string]string{
		"build-arg:A": "1", "label:l": "v", "add-hosts": "h=1.2.3.4,six=::1", "force-network-mode": "host", "memory": "64", "cpusetcpus": "0-1",
		"no-cache": "", "image-resolve-mode": "pull", "target": "x", "ulimit": "nofile=1:2", "platform": "linux/arm64", "filename": "Dockerfile",
	} {
		if got, ok := o.attrs[k]; !ok || got != want {
			t.Errorf("%s is %q, want %q", k, got, want)
		}
	}
	for _, k := range []string{"build-arg:B", "shm-size", "context"} {
		if v, ok := o.attrs[k]; ok {
			t.Errorf("%s is %q", k, v)
		}
	}
	if o.logins["reg:5000"].Password != "p" || len(o.cacheFrom) != 1 || len(o.entitlements) != 1 {
		t.Errorf("%+v", o)
	}
	for _, bad := range []string{"version=3", "t=A", "t=x@sha256:" + "0000000000000000000000000000000000000000000000000000000000000000", "squash=1", "buildargs=[", "labels=1",
		"networkmode=n", "extrahosts=h", "memory=x", "ulimits={", "platform=a/b/c/d", "cachefrom=[1]", "cachefrom=[\"A\"]", "outputs=[{\"Type\":\"tar\"}]", "isolation=hyperv"} {
		if o, err := parse(httptest.NewRequest("POST", "/build?"+bad, nil)); err == nil {
			t.Errorf("%s: %+v", bad, o)
		}
	}
}

func TestCommandOf(t *testing.T) {
	for run, want := range map[string]string{
		"false": "/bin/sh -c false", `["a","b c"]`: "a b c", "--mount=type=tmpfs,target=/x --network=none exit 3": "/bin/sh -c exit 3", "--": "/bin/sh -c --",
	} {
		if got := commandOf(run); got != want {
			t.Errorf("%q: %q, want %q", run, got, want)
		}
	}
}

func TestStepName(t *testing.T) {
	for name, want := range map[string]string{
		"[1/3] FROM x": "1/3 FROM x", "[stage-0 2/3] RUN [a] b": "2/3 RUN [a] b", "[a b  10/12] COPY": "10/12 COPY",
		"[internal] load": "", "[linux/arm64 build 2/4] RUN x": "2/4 RUN x", "exporting": "", "[auth] x": "",
	} {
		got := ""
		if m := stepName.FindStringSubmatch(name); m != nil {
			got = m[1] + "/" + m[2] + " " + m[3]
		}
		if got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}
