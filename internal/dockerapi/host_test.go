package dockerapi

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// TestActAsHost keeps what makes a caller root of the host by another way than a container from whom a policy denies it.
func TestActAsHost(t *testing.T) {
	f := &fake{mayNot: fault.New(fault.Forbidden, "policy rule %q", "no-root")}
	_, c := serveFake(t, f)
	// Everybody may look at what has no secret. A route that comes is refused until it is found here.
	harmless, n := []string{"GET /servin/os/status", "GET /servin/os/config", "GET /servin/debug-shell", "DELETE /servin/debug-shell/{id}"}, 0
	for _, r := range routes(Config{}) {
		call := r.method + " " + r.pattern
		about := strings.HasPrefix(r.pattern, "/servin/os/") || strings.HasPrefix(r.pattern, "/servin/debug-shell") && r.pattern != debugShellRun
		if !about || slices.Contains(harmless, call) {
			continue
		}
		n++
		req, err := http.NewRequestWithContext(t.Context(), r.method, "http://engine"+r.pattern, strings.NewReader("tar"))
		if err != nil {
			t.Fatal(err)
		}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %s", call, res.Status)
		}
	}
	if n < 6 {
		t.Errorf("%d routes were tried", n)
	}
	res, err := c.Get("http://engine/servin/os/status")
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("looking at it: %v %v", res, err)
	}
	res.Body.Close()
}

// TestToldOfChanges has in the audit log how the system was changed, without what an address may hide.
func TestToldOfChanges(t *testing.T) {
	q := url.Values{"url": {"https://me:secret@mirror/cloudos.release?token=secret"}, "unsigned": {"1"}, "downgrade": {"true"}, "reboot": {"1"}}
	hr := httptest.NewRequest("POST", "/servin/os/upgrade?"+q.Encode(), nil)
	told := (&request{Request: hr, query: q}).told()
	if told["url"] != "mirror/cloudos.release" || told["unsigned"] != "1" || told["downgrade"] != "true" || told["reboot"] != "1" {
		t.Errorf("told: %v", told)
	}
}
