package cli

import (
	"encoding/base64"
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestSearch looks like docker search.
func TestSearch(t *testing.T) {
	const answer = `[{"name":"nginx","description":"Official build of Nginx, with a description\nthat is long","star_count":20000,"is_official":true,"is_automated":false},
{"name":"bitnami/nginx","description":"short","star_count":199,"is_official":false,"is_automated":false}]`
	var query, auth string
	h := func(w http.ResponseWriter, r *http.Request) {
		query = r.URL.Path + "?" + r.URL.RawQuery
		b, _ := base64.URLEncoding.DecodeString(r.Header.Get("X-Registry-Auth"))
		auth = string(b)
		io.WriteString(w, answer)
	}
	code, out, errb := call(t, h, nil, strings.Fields("search --limit 5 --filter is-official=true --filter stars=3 nginx")...)
	want := "NAME            DESCRIPTION                                     STARS   OFFICIAL\n" +
		"nginx           Official build of Nginx, with a description …   20000   [OK]\n" +
		"bitnami/nginx   short                                           199     \n"
	if code != 0 || out != want {
		t.Errorf("%d %s%s", code, out, errb)
	}
	for _, p := range []string{"/images/search?", "limit=5", "term=nginx", "is-official", "stars"} {
		if !strings.Contains(query, p) {
			t.Errorf("asked %s, want %s in it", query, p)
		}
	}
	if strings.Contains(auth, "assword") {
		t.Errorf("sent %s", auth)
	}
	for args, want := range map[string]string{
		"search --format {{.Name}}:{{.StarCount}} x":             "nginx:20000\nbitnami/nginx:199\n",
		"search --format {{.Name}}={{.IsOfficial}} --no-trunc x": "nginx=[OK]\nbitnami/nginx=\n",
	} {
		if code, out, errb := call(t, h, nil, strings.Fields(args)...); code != 0 || out != want {
			t.Errorf("%s: %d %q %s", args, code, out, errb)
		}
	}
	if code, out, _ := call(t, h, nil, "search", "--json", "x"); code != 0 || strings.Count(out, "\n") != 2 || !strings.Contains(out, `"star_count":20000`) {
		t.Errorf("--json: %d %s", code, out)
	}
	if code, _, errb := call(t, nil, nil, "search", "--filter", "official", "x"); code != 125 {
		t.Errorf("a filter without a value: %d %s", code, errb)
	}
	if n := searchedRegistry("quay.io/a/b"); n != "quay.io/x" {
		t.Error(n)
	}
	if n := searchedRegistry("user/name"); n != "x" {
		t.Error(n)
	}
}
