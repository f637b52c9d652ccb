#!/usr/bin/python3
"""Drives the engine of DOCKER_HOST with Docker's Python library.

usage: docker_py.py [unittest arguments]

An image busybox:latest must be there. Debian's python3-docker is the library.
"""
import io
import itertools
import json
import os
import socket
import tarfile
import tempfile
import threading
import time
import unittest

import docker
import requests
from docker.types import IPAMConfig, IPAMPool, LogConfig, Mount
from docker.utils.socket import next_frame_header, read_exactly

IMAGE = "busybox:latest"
COUNT = itertools.count()


def name(prefix="py"):
    return "%s-%d-%d" % (prefix, os.getpid(), next(COUNT))


def tar_of(**files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for n, text in files.items():
            i = tarfile.TarInfo(n)
            i.size = len(text)
            t.addfile(i, io.BytesIO(text))
    return out.getvalue()


def files_of(stream):
    data = io.BytesIO(b"".join(stream))
    with tarfile.open(fileobj=data) as t:
        return {m.name: (t.extractfile(m).read() if m.isfile() else None) for m in t}


class Case(unittest.TestCase):
    version = "auto"

    def setUp(self):
        self.client = docker.from_env(version=self.version, timeout=60)
        self.api = self.client.api
        self.addCleanup(self.client.close)

    def make(self, command="true", **kw):
        host = kw.pop("host", {})
        c = self.api.create_container(IMAGE, command, host_config=self.api.create_host_config(**host), **kw)["Id"]
        self.addCleanup(self.drop, c)
        return c

    def drop(self, c):
        try:
            self.api.remove_container(c, force=True, v=True)
        except docker.errors.APIError:
            pass  # it went by itself

    def start(self, command="true", **kw):
        c = self.make(command, **kw)
        self.api.start(c)
        return c

    def done(self, command="true", **kw):
        c = self.start(command, **kw)
        return c, self.api.wait(c)["StatusCode"]

    def network(self, **kw):
        n = name("net")
        i = self.api.create_network(n, **kw)["Id"]
        self.addCleanup(self.api.remove_network, i)
        return n, i

    def fails(self, status, text, fn, *args, **kw):
        with self.assertRaises(docker.errors.APIError) as e:
            fn(*args, **kw)
        self.assertEqual(e.exception.status_code, status)
        self.assertIn(text, e.exception.explanation)


class System(Case):
    def test_info_version_ping(self):
        self.assertTrue(self.client.ping())
        v = self.client.version()
        self.assertEqual(v["Os"], "linux")
        info = self.client.info()
        self.assertEqual(info["Swarm"]["LocalNodeState"], "inactive")
        for key in ("Containers", "Images", "Driver", "MemTotal", "NCPU", "ServerVersion", "Plugins"):
            self.assertIn(key, info)

    def test_image_count(self):
        ids = {i["Id"] for i in self.api.images(all=True)}
        self.assertEqual(len(ids), self.client.info()["Images"])

    def test_disk_usage(self):
        df = self.client.df()
        for key in ("LayersSize", "Images", "Containers", "Volumes"):
            self.assertIn(key, df)

    def test_every_version(self):
        for v in ("1.24", "1.30", "1.39", "1.41", "1.44", "1.48", "1.51", "1.52", "1.56"):
            c = docker.APIClient(base_url=os.environ["DOCKER_HOST"], version=v)
            self.assertEqual(c.version()["ApiVersion"], "1.56")
            c.containers(all=True, size=True), c.images(), c.networks(), c.volumes(), c.info()
            c.close()

    def test_events(self):
        since = time.time()
        c, _ = self.done("true", name=name("ev"))
        self.api.remove_container(c)
        got = list(self.client.events(since=since, until=time.time() + 0.5, filters={"container": c}, decode=True))
        actions = [e["Action"] for e in got]
        self.assertEqual([a for a in actions if a in ("create", "start", "die", "destroy")], ["create", "start", "die", "destroy"])
        self.assertTrue(all(e["Type"] == "container" and e["Actor"]["ID"] == c and "timeNano" in e for e in got))

    def test_events_cancel(self):
        stream = self.client.events(decode=True)
        threading.Timer(0.3, stream.close).start()
        list(stream)

    def test_not_a_swarm(self):
        for fn in (self.api.nodes, self.api.services, self.api.tasks, self.api.inspect_swarm):
            self.fails(503, "swarm", fn)
        self.assertTrue(self.api.leave_swarm(force=True))  # what is not there can be left

    def test_no_plugins(self):
        self.assertEqual(self.client.plugins.list(), [])
        with self.assertRaises(docker.errors.NotFound):
            self.client.plugins.get("nothing")


class Containers(Case):
    def test_life(self):
        n = name()
        c = self.make("sleep 1000", name=n, labels={"a": "b"}, environment={"Foo": None, "Other": "one", "Blank": ""})
        d = self.api.inspect_container(c)
        self.assertEqual(d["Name"], "/" + n)
        self.assertLessEqual({"Foo", "Other=one", "Blank="}, set(d["Config"]["Env"]))
        self.api.start(c)
        self.assertTrue(self.api.inspect_container(c)["State"]["Running"])
        l = [x for x in self.api.containers(filters={"label": "a=b", "name": n})]
        self.assertEqual([x["Id"] for x in l], [c])
        self.assertEqual((l[0]["Command"], l[0]["State"]), ("sleep 1000", "running"))
        self.api.pause(c)
        self.assertTrue(self.api.inspect_container(c)["State"]["Paused"])
        self.api.unpause(c)
        self.fails(409, "stop the container before", self.api.remove_container, c)
        first = self.api.inspect_container(c)["State"]["StartedAt"]
        self.api.restart(c, timeout=0)
        self.assertNotEqual(self.api.inspect_container(c)["State"]["StartedAt"], first)
        self.api.rename(c, n + "x")
        self.assertEqual(self.api.inspect_container(c)["Name"], "/" + n + "x")
        self.api.kill(c, signal=9)
        self.assertEqual(self.api.wait(c)["StatusCode"], 137)
        self.fails(409, "is not running", self.api.kill, c)
        self.api.remove_container(c)
        self.fails(404, "No such container", self.api.inspect_container, c)

    def test_commands(self):
        for cmd in ("true", 'echo "a b"', '/bin/sh -c "echo Hello"', "/bin/sh -c 'echo \"x\"'", 'true && echo "x"'):
            self.assertEqual(self.done(cmd)[1], 0, cmd)

    def test_host_config(self):
        c = self.start("sleep 60", stop_timeout=25, host=dict(
            mem_limit="700M", memswap_limit="1G", cpu_shares=512, cpuset_cpus="0", pids_limit=50, group_add=[1000, "1001"],
            tmpfs={"/tmp1": "size=3M"}, init=True, isolation="default", runtime="runc", ulimits=[{"Name": "nofile", "Soft": 100, "Hard": 200}],
            log_config=LogConfig(type="", config={"max-file": "100"}), extra_hosts={"some": "10.1.2.3"}, oom_score_adj=100,
            device_cgroup_rules=["c 7:128 rwm"], shm_size=1 << 20, network_mode="none", pid_mode="host"))
        h = self.api.inspect_container(c)["HostConfig"]
        want = {"Memory": 700 << 20, "MemorySwap": 1 << 30, "CpuShares": 512, "CpusetCpus": "0", "PidsLimit": 50, "GroupAdd": ["1000", "1001"],
                "Tmpfs": {"/tmp1": "size=3M"}, "Init": True, "Isolation": "default", "Runtime": "runc", "PidMode": "host",
                "LogConfig": {"Type": "json-file", "Config": {"max-file": "100"}}, "ExtraHosts": ["some:10.1.2.3"], "OomScoreAdj": 100,
                "DeviceCgroupRules": ["c 7:128 rwm"], "ShmSize": 1 << 20}
        self.assertEqual({k: h[k] for k in want}, want)
        self.assertEqual(self.api.inspect_container(c)["Config"]["StopTimeout"], 25)

    def test_errors(self):
        self.fails(400, "logger: no log driver named 'asdf-nope' is registered", self.make, host=dict(log_config=LogConfig(type="asdf-nope", config={})))
        with self.assertRaises(docker.errors.ImageNotFound):
            self.api.create_container("no-such-image-here", "true")
        n = name()
        self.make(name=n)
        self.fails(409, "is already in use by container", self.make, name=n)
        c = self.make(["/no/such/command"])
        self.fails(400, "no such file or directory", self.api.start, c)
        self.assertEqual(self.api.inspect_container(c)["State"]["ExitCode"], 127)

    def test_wait(self):
        c = self.make("sleep 1", host=dict(auto_remove=True))
        self.api.start(c)
        self.assertEqual(self.api.wait(c, condition="removed")["StatusCode"], 0)
        c = self.make()
        with self.assertRaises(requests.exceptions.ConnectionError):
            self.api.wait(c, condition="removed", timeout=0.5)

    def test_logs(self):
        c, _ = self.done(["sh", "-c", "echo Line1; echo Line2; echo err >&2"])
        self.assertEqual(self.api.logs(c, stderr=False), b"Line1\nLine2\n")
        self.assertEqual(self.api.logs(c, stdout=False), b"err\n")
        self.assertEqual(self.api.logs(c, tail=1, stderr=False), b"Line2\n")
        self.assertEqual(self.api.logs(c, tail=0), b"")
        if self.version == "auto":
            self.assertEqual(self.api.logs(c, until=1), b"")
        self.assertEqual(b"".join(self.api.logs(c, stream=True, follow=True, stderr=False)), b"Line1\nLine2\n")
        self.assertRegex(self.api.logs(c, timestamps=True, tail=1).decode(), r"^\d{4}-\d\d-\d\dT[\d:.]+Z ")

    def test_attach(self):
        line = "hi there, words!"
        c = self.make(["printf", line])
        s = self.api.attach_socket(c, {"stdout": 1, "stream": 1, "logs": 1})
        self.addCleanup(s.close)
        self.api.start(c)
        kind, size = next_frame_header(s)
        self.assertEqual((kind, size, read_exactly(s, size).decode()), (1, len(line), line))
        c, _ = self.done("echo hello")
        self.assertEqual(self.api.attach(c, stream=False, logs=True), b"hello\n")

    def test_attach_input(self):
        for tty in (False, True):
            c = self.start("cat", stdin_open=True, tty=tty)
            s = self.api.attach_socket(c, {"stdin": 1, "stdout": 1, "stream": 1})
            self.addCleanup(s.close)
            os.write(s.fileno(), b"abc\n")
            if not tty:
                kind, size = next_frame_header(s)
                self.assertEqual(kind, 1)
            self.assertEqual(read_exactly(s, 4)[:3], b"abc")

    def detached(self, sock, keys):
        s = getattr(sock, "_sock", sock)
        s.settimeout(10)
        s.sendall(b"xxx")
        for k in keys:
            time.sleep(0.05)
            s.sendall(k)
        while True:  # what was echoed, then the end
            if not s.recv(4096):
                break
        s.close()

    def test_detach(self):
        for configured, given, keys in ((None, None, (b"\x10", b"\x11")), ("ctrl-p", None, (b"\x10",)), ("ctrl-p", "ctrl-x", (b"\x18",))):
            self.api._general_configs = {"detachKeys": configured} if configured else {}
            c = self.start("cat", stdin_open=True, tty=True)
            params = {"stdin": True, "stream": True}
            if given:
                params["detachKeys"] = given
            self.detached(self.api.attach_socket(c, params), keys)
            self.assertTrue(self.api.inspect_container(c)["State"]["Running"])
            e = self.api.exec_create(c, "cat", stdin=True, tty=True, **({"detach_keys": given} if given else {}))
            self.detached(self.api.exec_start(e, tty=True, socket=True), keys)
            self.assertTrue(self.api.exec_inspect(e)["Running"])

    def test_archive(self):
        c, _ = self.done(["sh", "-c", "echo -n some data > /vol1/data.txt"], volumes=["/vol1"])
        stream, stat = self.api.get_archive(c, "/vol1/data.txt")
        self.assertEqual(files_of(stream), {"data.txt": b"some data"})
        self.assertEqual((stat["name"], stat["size"]), ("data.txt", 9))
        c = self.make(["sh", "-c", "cat /vol1/a /vol1/b"], volumes=["/vol1"])
        self.assertTrue(self.api.put_archive(c, "/vol1", tar_of(a=b"one ", b=b"two")))
        self.api.start(c)
        self.api.wait(c)
        self.assertEqual(self.api.logs(c), b"one two")
        self.fails(404, "Could not find the file /none in container " + c, self.api.get_archive, c, "/none")

    def test_diff_export_commit(self):
        c, _ = self.done("touch /test")
        self.assertEqual(self.api.diff(c), [{"Path": "/test", "Kind": 1}])
        self.assertIn("test", files_of(self.api.export(c)))
        i = self.api.commit(c, repository=name("made"), changes=["EXPOSE 8000", 'CMD ["bash"]'], message="m", author="a")["Id"]
        self.addCleanup(self.api.remove_image, i, force=True)
        d = self.api.inspect_image(i)
        self.assertEqual((list(d["Config"]["ExposedPorts"]), d["Config"]["Cmd"], d["Comment"], d["Author"]), (["8000/tcp"], ["bash"], "m", "a"))
        if self.version != "auto":
            self.assertEqual(d["Parent"], self.api.inspect_image(IMAGE)["Id"])

    def test_top_stats_update(self):
        c = self.start("sleep 60")
        t = self.api.top(c)
        self.assertEqual(t["Titles"], ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"])
        self.assertEqual([p[-1] for p in t["Processes"]], ["sleep 60"])
        t = self.api.top(c, "waux")
        self.assertEqual(t["Titles"], ["USER", "PID", "%CPU", "%MEM", "VSZ", "RSS", "TTY", "STAT", "START", "TIME", "COMMAND"])
        s = self.api.stats(c, stream=False)
        self.assertLessEqual({"read", "networks", "precpu_stats", "cpu_stats", "memory_stats", "blkio_stats", "pids_stats"}, set(s))
        stream = self.api.stats(c, decode=True)
        self.assertGreater(next(stream)["memory_stats"]["usage"], 0)
        stream.close()
        self.api.update_container(c, mem_limit=300 << 20, restart_policy={"Name": "on-failure", "MaximumRetryCount": 42})
        h = self.api.inspect_container(c)["HostConfig"]
        self.assertEqual((h["Memory"], h["RestartPolicy"]), (300 << 20, {"Name": "on-failure", "MaximumRetryCount": 42}))

    def test_ports(self):
        c = self.start("sleep 60", ports=[1111, (2222, "udp"), 3333], host=dict(
            port_bindings={1111: ("127.0.0.1", None), "2222/udp": ("127.0.0.1",), 3333: None}))
        self.assertEqual(self.api.port(c, 1111)[0]["HostIp"], "127.0.0.1")
        ports = self.api.inspect_container(c)["NetworkSettings"]["Ports"]
        self.assertEqual(sorted(ports), ["1111/tcp", "2222/udp", "3333/tcp"])
        for l in ports.values():
            for p in l:
                self.assertGreater(int(p["HostPort"]), 0)

    def test_binds_and_mounts(self):
        d = tempfile.mkdtemp()
        self.addCleanup(lambda: (os.path.exists(d + "/f") and os.remove(d + "/f"), os.rmdir(d)))
        self.assertEqual(self.done("touch /mnt/f", host=dict(binds={d: {"bind": "/mnt", "ro": False}}))[1], 0)
        for host, rw in ((dict(binds={d: {"bind": "/mnt", "ro": True}}), False), (dict(mounts=[Mount("/mnt", d, type="bind")]), True),
                         (dict(mounts=[Mount("/mnt", d, type="bind", read_only=True)]), False)):
            c, code = self.done("touch /mnt/f", host=host)
            self.assertEqual(code == 0, rw)
            m = self.api.inspect_container(c)["Mounts"]
            self.assertEqual([(x["Source"], x["Destination"], x["RW"]) for x in m], [(d, "/mnt", rw)])
        v = name("vol")
        c = self.make(host=dict(mounts=[Mount("/mnt", v, labels={"x": "y"})]))
        self.assertEqual(self.api.inspect_container(c)["Mounts"][0]["Name"], v)
        self.assertEqual(self.api.inspect_volume(v)["Labels"], {"x": "y"})
        o = self.make("cat", host=dict(volumes_from=[c]))
        self.assertEqual(self.api.inspect_container(o)["Mounts"][0]["Name"], v)
        self.drop(o), self.drop(c)
        self.api.remove_volume(v)

    def test_links(self):
        a = self.start("cat", stdin_open=True, environment={"FOO": "1"}, name=name("a"))
        an = self.api.inspect_container(a)["Name"][1:]
        b, code = self.done("env", name=name("b"), host=dict(links={an: "mylink"}))
        self.assertEqual(code, 0)
        env = self.api.logs(b).decode()
        self.assertIn("MYLINK_NAME=", env)
        self.assertIn("MYLINK_ENV_FOO=1", env)
        link = self.api.inspect_container(b)["Name"] + "/mylink"
        names = lambda: [n for c in self.api.containers(all=True) for n in c["Names"]]
        self.assertIn(link, names())
        self.api.remove_container(link[1:], link=True)
        self.assertNotIn(link, names())

    def test_restart_policy(self):
        c = self.start("sleep 0.1", host=dict(restart_policy={"Name": "always", "MaximumRetryCount": 0}))
        for _ in range(100):
            if self.api.inspect_container(c)["RestartCount"] > 0:
                break
            time.sleep(0.05)
        self.assertGreater(self.api.inspect_container(c)["RestartCount"], 0)
        self.api.stop(c, timeout=0)
        self.assertEqual(self.api.inspect_container(c)["State"]["Status"], "exited")

    def test_health(self):
        c = self.start("sleep 60", healthcheck=docker.types.Healthcheck(test="true", interval=10 ** 8, retries=2))
        for _ in range(100):
            h = self.api.inspect_container(c)["State"]["Health"]
            if h["Status"] == "healthy":
                break
            time.sleep(0.05)
        self.assertEqual((h["Status"], h["Log"][0]["ExitCode"]), ("healthy", 0))

    def test_models(self):
        run = self.client.containers.run
        self.assertEqual(run(IMAGE, "echo hello world", remove=True), b"hello world\n")
        self.assertEqual(list(run(IMAGE, ["sh", "-c", "echo a; echo b"], stream=True, remove=True)), [b"a\n", b"b\n"])
        with self.assertRaises(docker.errors.ContainerError) as e:
            run(IMAGE, "cat /none", remove=True)
        self.assertEqual(e.exception.exit_status, 1)
        self.assertIn("No such file or directory", str(e.exception))
        self.assertEqual(run(IMAGE, ["sh", "-c", "echo hello; sleep 1"], auto_remove=True), b"hello\n")
        self.assertIsNone(run(IMAGE, "echo x", log_config=dict(type="none"), remove=True))
        c = run(IMAGE, "sleep 100", detach=True)
        self.addCleanup(self.drop, c.id)
        self.assertEqual(c.image, self.client.images.get(IMAGE))
        self.assertIn(c.id, [x.id for x in self.client.containers.list()])
        self.assertEqual(c.exec_run("cat /etc/hostname"), (0, c.id[:12].encode() + b"\n"))
        self.assertIn(c.exec_run("no-such-command")[0], (126, 127))
        c.stop(timeout=0)
        c.reload()
        self.assertEqual(c.status, "exited")

    def test_prune(self):
        c, _ = self.done(["sh", "-c", "echo hello > /data.txt"], labels={"prune": "me"})
        k = self.start("sleep 1000", labels={"prune": "me"})
        r = self.api.prune_containers({"label": "prune=me"})
        self.assertEqual(r["ContainersDeleted"], [c])
        self.assertGreater(r["SpaceReclaimed"], 0)
        self.assertTrue(self.api.inspect_container(k)["State"]["Running"])


class OldContainers(Containers):
    version = "1.30"

    def test_mac(self):
        c = self.start("sleep 60", mac_address="02:42:ac:11:00:0a")
        self.assertEqual(self.api.inspect_container(c)["NetworkSettings"]["MacAddress"], "02:42:ac:11:00:0a")

    test_wait = test_health = test_every_version = None


class Exec(Case):
    def setUp(self):
        super().setUp()
        self.c = self.start("cat", stdin_open=True)

    def run_exec(self, cmd, **kw):
        return self.api.exec_start(self.api.exec_create(self.c, cmd, **kw))

    def test_output(self):
        self.assertEqual(self.run_exec(["echo", "hello"]), b"hello\n")
        self.assertEqual(self.run_exec("whoami"), b"root\n")
        self.assertEqual(self.run_exec("pwd", workdir="/tmp"), b"/tmp\n")
        self.assertIn(b"X=Y\n", self.run_exec("env", environment=["X=Y"]))
        self.assertEqual(self.run_exec("id -u", user="1000"), b"1000\n")
        caps = lambda **kw: int(self.run_exec("grep CapEff /proc/self/status", **kw).split()[1], 16)
        self.assertGreater(caps(privileged=True), caps())

    def test_demux(self):
        cmd = ["sh", "-c", "echo out; sleep 0.2; echo err >&2"]
        start = lambda tty=False, **kw: self.api.exec_start(self.api.exec_create(self.c, cmd, tty=tty), **kw)
        self.assertEqual(start(), b"out\nerr\n")
        self.assertEqual(list(start(stream=True)), [b"out\n", b"err\n"])
        self.assertEqual(start(demux=True), (b"out\n", b"err\n"))
        self.assertEqual(list(start(demux=True, stream=True)), [(b"out\n", None), (None, b"err\n")])
        # A terminal, but frames: the start did not ask for one.
        self.assertEqual(start(tty=True), b"out\r\nerr\r\n")
        self.assertEqual(list(start(tty=True, stream=True)), [b"out\r\n", b"err\r\n"])
        self.assertEqual(start(tty=True, demux=True), (b"out\r\nerr\r\n", None))

    def test_detached_and_inspect(self):
        e = self.api.exec_create(self.c, "sleep 100")["Id"]
        self.assertEqual(self.api.exec_start(e, detach=True), "")
        i = self.api.exec_inspect(e)
        self.assertTrue(i["Running"])
        self.assertGreater(i["Pid"], 1)
        self.assertEqual(i["ProcessConfig"]["entrypoint"], "sleep")
        e = self.api.exec_create(self.c, ["mkdir", "/does/not/exist"])
        self.api.exec_start(e)
        self.assertNotEqual(self.api.exec_inspect(e)["ExitCode"], 0)
        e = self.api.exec_create(self.c, "no-such-command")
        self.api.exec_start(e)
        self.assertEqual(self.api.exec_inspect(e)["ExitCode"], 127)
        self.fails(409, "already", self.api.exec_start, e, detach=True)
        self.fails(404, "No such exec instance", self.api.exec_inspect, "nothing")

    def test_input(self):
        e = self.api.exec_create(self.c, "cat", stdin=True)
        s = self.api.exec_start(e, socket=True)
        os.write(s.fileno(), b"through")
        raw = getattr(s, "_sock", s)
        raw.shutdown(socket.SHUT_WR)
        kind, size = next_frame_header(s)
        self.assertEqual((kind, read_exactly(s, size)), (1, b"through"))
        s.close()

    def test_resize(self):
        e = self.api.exec_create(self.c, ["sh", "-c", "sleep 0.3; stty size"], tty=True)
        stream = self.api.exec_start(e, tty=True, stream=True)
        self.api.exec_resize(e, height=33, width=77)
        self.assertEqual(b"".join(stream), b"33 77\r\n")


class Images(Case):
    def test_list_and_inspect(self):
        self.assertIsInstance(self.api.images(quiet=True)[0], str)
        i = self.client.images.get(IMAGE)
        self.assertIn(IMAGE, i.tags)
        for q in ("busybox", IMAGE):
            self.assertIn(i.id, [x.id for x in self.client.images.list(q)])
        self.assertTrue(i.history())
        with self.assertRaises(docker.errors.ImageNotFound):
            self.client.images.get("no-such-image")

    def test_tag_and_remove(self):
        repo = name("repo")
        i = self.client.images.get(IMAGE)
        self.assertTrue(i.tag(repo, "some-tag"))
        self.assertIn(i.id, [x.id for x in self.client.images.list(repo)])
        self.client.images.remove(repo + ":some-tag")
        self.assertEqual(self.client.images.list(repo), [])

    def test_import(self):
        data = tar_of(testdata=b"A" * 500)
        for src in ("data", "file", "stream"):
            repo = name("imported")
            with tempfile.NamedTemporaryFile() as f:
                f.write(data)
                f.flush()
                f.seek(0)
                changes = ["USER foobar", 'CMD ["echo"]']
                if src == "data":
                    out = self.api.import_image_from_data(data, repository=repo, changes=changes)
                elif src == "file":
                    out = self.api.import_image(f.name, repository=repo, changes=changes)
                else:
                    out = self.api.import_image(f, repository=repo, changes=changes)
            last = json.loads(out.splitlines()[-1])
            self.assertNotIn("error", last)
            i = self.api.inspect_image(last["status"])
            self.addCleanup(self.api.remove_image, i["Id"], force=True)
            self.assertEqual((i["Config"]["User"], i["Config"]["Cmd"]), ("foobar", ["echo"]))

    def test_save_and_load(self):
        data = b"".join(self.api.get_image(IMAGE))
        self.assertIn("Loaded image: %s\n" % IMAGE, [l.get("stream") for l in self.api.load_image(data)])

    def test_remove_deletes(self):
        c, _ = self.done("touch /new")
        i = self.api.commit(c)["Id"]
        self.assertIn({"Deleted": i}, self.api.remove_image(i, force=True))
        self.assertNotIn(i, [x["Id"] for x in self.api.images(all=True)])

    def test_prune(self):
        c, _ = self.done("touch /dangling")
        i = self.api.commit(c)["Id"]
        r = self.api.prune_images({"dangling": True})
        self.assertIn(i, [x.get("Deleted") for x in r["ImagesDeleted"]])
        self.assertGreater(r["SpaceReclaimed"], 0)


class Networks(Case):
    def test_list_and_inspect(self):
        n, i = self.network(labels={"a": "b"}, internal=True)
        self.assertEqual([x["Id"] for x in self.api.networks(names=[n])], [i])
        self.assertEqual([x["Id"] for x in self.api.networks(ids=[i[:8]])], [i])
        d = self.api.inspect_network(i)
        self.assertEqual((d["Name"], d["Driver"], d["Scope"], d["IPAM"]["Driver"], d["Labels"], d["Internal"]), (n, "bridge", "local", "default", {"a": "b"}, True))
        self.fails(409, "already exists", self.api.create_network, n, check_duplicate=True)
        with self.assertRaises(docker.errors.APIError):
            self.api.create_network(name(), driver="host")

    def test_ipam(self):
        aux = {"a": "172.28.1.5", "b": "172.28.1.6"}
        _, i = self.network(ipam=IPAMConfig(pool_configs=[IPAMPool(subnet="172.28.0.0/16", iprange="172.28.5.0/24", gateway="172.28.5.254", aux_addresses=aux)]))
        ipam = self.api.inspect_network(i)["IPAM"]
        self.assertIsNone(ipam.get("Options"))
        self.assertEqual(ipam["Config"], [{"Subnet": "172.28.0.0/16", "IPRange": "172.28.5.0/24", "Gateway": "172.28.5.254", "AuxiliaryAddresses": aux}])

    def test_connect(self):
        n, i = self.network(ipam=IPAMConfig(pool_configs=[IPAMPool(subnet="172.29.0.0/16")]))
        c = self.start("top")
        self.assertFalse(self.api.inspect_network(i).get("Containers"))
        self.api.connect_container_to_network(c, i, aliases=["foo", "bar"], ipv4_address="172.29.5.24")
        self.assertEqual(list(self.api.inspect_network(i)["Containers"]), [c])
        e = self.api.inspect_container(c)["NetworkSettings"]["Networks"][n]
        self.assertLessEqual({"foo", "bar"}, set(e["Aliases"]))
        self.assertEqual((e["IPAMConfig"]["IPv4Address"], e["IPAddress"]), ("172.29.5.24", "172.29.5.24"))
        with self.assertRaises(docker.errors.APIError):
            self.api.connect_container_to_network(c, i)
        self.api.disconnect_container_from_network(c, i)
        self.assertFalse(self.api.inspect_network(i).get("Containers"))
        with self.assertRaises(docker.errors.APIError):
            self.api.disconnect_container_from_network(c, i)

    def test_create_with(self):
        n, _ = self.network(ipam=IPAMConfig(pool_configs=[IPAMPool(subnet="172.30.0.0/16")]))
        conf = self.api.create_networking_config({n: self.api.create_endpoint_config(aliases=["foo"], ipv4_address="172.30.0.23", links={"up": "bar"})})
        c = self.start("top", networking_config=conf, host=dict(network_mode=n))
        up = self.start("top", name="up", host=dict(network_mode=n))
        e = self.api.inspect_container(c)["NetworkSettings"]["Networks"][n]
        self.assertIn("foo", e["Aliases"])
        self.assertEqual((e["IPAddress"], e["Links"]), ("172.30.0.23", ["up:bar"]))
        ex = self.api.exec_create(c, ["nslookup", "bar"])
        out = self.api.exec_start(ex)
        self.assertIn(self.api.inspect_container(up)["NetworkSettings"]["Networks"][n]["IPAddress"].encode(), out)
        self.drop(c), self.drop(up)

    def test_prune(self):
        n = name("net")
        self.api.create_network(n, labels={"prune": n})
        self.assertEqual(self.api.prune_networks({"label": "prune=" + n})["NetworksDeleted"], [n])


class Volumes(Case):
    def test_volumes(self):
        n = name("vol")
        v = self.api.create_volume(n, driver="local", labels={"a": n})
        self.assertEqual((v["Name"], v["Driver"], v["Labels"]), (n, "local", {"a": n}))
        self.assertEqual([x["Name"] for x in self.api.volumes(filters={"label": "a=" + n})["Volumes"]], [n])
        c = self.make(host=dict(binds=[n + ":/v"]))
        self.fails(409, "in use", self.api.remove_volume, n)
        self.drop(c)
        self.api.remove_volume(n)
        self.fails(404, "no such volume", self.api.inspect_volume, n)
        with self.assertRaises(docker.errors.APIError):
            self.api.create_volume(n, driver="invalid.driver")


class Builds(Case):
    def test_build(self):
        context = tar_of(Dockerfile=b"FROM busybox\nARG V=1\nENV V=$V\nCOPY f /f\nCMD cat /f && echo $V\n", f=b"content ")
        image, log = self.client.images.build(fileobj=io.BytesIO(context), custom_context=True, buildargs={"V": "2"}, tag=name("built"), rm=True)
        self.addCleanup(self.api.remove_image, image.id, force=True)
        self.assertEqual(self.client.containers.run(image, remove=True), b"content 2\n")
        with self.assertRaises(docker.errors.BuildError):
            self.client.images.build(fileobj=io.BytesIO(b"FROM busybox\nRUN exit 3\n"), rm=True)


if __name__ == "__main__":
    unittest.main(verbosity=2)
