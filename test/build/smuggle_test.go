package build

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// TestRequestsBehindAnother keeps clients from the builder's own door: whatever they send behind a request
// whose connection it was handed is not judged by the engine, so it must not be answered.
func TestRequestsBehindAnother(t *testing.T) {
	file := t.TempDir() + "/policy.yaml"
	if err := os.WriteFile(file, []byte("version: 1\nrules:\n  - name: no-root\n    privileged: deny\n    hostNamespaces: {allow: []}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e := start(t, "policy: "+file+"\n")
	const behind = "GET /usage HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n"
	for name, first := range map[string]string{
		"a session without a name":  "POST /session HTTP/1.1\r\nHost: e\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
		"no session":                "POST /session HTTP/1.1\r\nHost: e\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nX-Docker-Expose-Session-Uuid: a\r\nContent-Length: 0\r\nExpect: 100-continue\r\n\r\n",
		"a build":                   "POST /build?remote=ftp://nowhere HTTP/1.1\r\nHost: e\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
		"a build of another kind":   "POST /build/cancel?id=x HTTP/1.1\r\nHost: e\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n",
		"a prune":                   "POST /build/prune HTTP/1.1\r\nHost: e\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
		"a refused one of BuildKit": "POST /grpc HTTP/1.1\r\nHost: e\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
	} {
		for _, late := range []bool{false, true} {
			answers := e.raw(t, first, behind, late)
			if strings.Count(answers, "HTTP/1.1 ") > 1 && !strings.HasSuffix(answers, `{"message":"page not found"}`+"\n") {
				t.Errorf("%s, then one for the builder (late: %t): %s", name, late, answers)
			}
		}
	}

	// Nor may a client take the engine's words to the builder away by calling them the connection's.
	req := "POST /build?networkmode=host&remote= HTTP/1.1\r\nHost: e\r\nConnection: Servin-Confined, Servin-Build-Caller\r\nContent-Length: 0\r\n\r\n"
	if answers := e.raw(t, req, "", false); !strings.HasPrefix(answers, "HTTP/1.1 403 ") {
		t.Errorf("the engine's headers named as the connection's: %s", answers)
	}
}

// raw sends a request, another behind it at once or after the first answer, and returns what comes back.
func (e *engine) raw(t *testing.T, first, behind string, late bool) string {
	t.Helper()
	c, err := net.Dial("unix", e.Sock())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if !late {
		first += behind
	}
	if _, err := io.WriteString(c, first); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	r := bufio.NewReader(io.TeeReader(c, &out))
	if late {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return out.String()
		}
		if resp.StatusCode == http.StatusSwitchingProtocols {
			return out.String()
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		if _, err := io.WriteString(c, behind); err != nil {
			return fmt.Sprintf("%s(%v)", out.String(), err)
		}
	}
	_ = c.SetReadDeadline(time.Now().Add(time.Second))
	_, _ = io.Copy(io.Discard, r)
	return out.String()
}
